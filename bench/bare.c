/* The bare system calls of a container, and nothing else: what no runtime can be faster than.
 *
 *     cc -O2 -o bare bare.c && ./bare ROOTFS PROGRAM [ARGUMENT]...
 *
 * Namespaces for mounts, host name, IPC, pids, cgroup and network; pivot_root into ROOTFS; a fresh /proc; exec; wait.
 * No cgroup, no limits, no writable layer, no capabilities dropped, no seccomp filter, no /dev, no init. An ordinary
 * user gets a user namespace too, otherwise the rest is not allowed. Exits as PROGRAM does, 125 where a call fails.
 */
#define _GNU_SOURCE
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <fcntl.h>

#define FAILED 125

static void check(long result, const char *call)
{
	if (result < 0) {
		perror(call);
		_exit(FAILED);
	}
}

static void put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	check(fd, path);
	check(write(fd, text, strlen(text)), path);
	close(fd);
}

static void be_root_inside(uid_t uid, gid_t gid)
{
	char map[64];

	snprintf(map, sizeof map, "0 %u 1", uid);
	put("/proc/self/uid_map", map);
	put("/proc/self/setgroups", "deny");
	snprintf(map, sizeof map, "0 %u 1", gid);
	put("/proc/self/gid_map", map);
}

int main(int argc, char **argv)
{
	uid_t uid = geteuid();
	gid_t gid = getegid();
	struct clone_args args = {
		.flags = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWCGROUP | CLONE_NEWNET |
			 (uid ? CLONE_NEWUSER : 0),
		.exit_signal = SIGCHLD,
	};
	int status;

	if (argc < 3) {
		fprintf(stderr, "usage: %s ROOTFS PROGRAM [ARGUMENT]...\n", argv[0]);
		return FAILED;
	}
	pid_t pid = syscall(SYS_clone3, &args, sizeof args);
	check(pid, "clone3");
	if (pid == 0) {
		if (uid)
			be_root_inside(uid, gid);
		check(mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL), "mount: make / private");
		check(mount(argv[1], argv[1], NULL, MS_BIND, NULL), "mount: bind the root file system");
		check(chdir(argv[1]), "chdir");
		check(mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL), "mount: proc");
		check(syscall(SYS_pivot_root, ".", "."), "pivot_root");
		check(umount2(".", MNT_DETACH), "umount2");
		check(chdir("/"), "chdir /");
		execv(argv[2], argv + 2);
		check(-1, argv[2]);
	}
	check(waitpid(pid, &status, 0), "waitpid");
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
