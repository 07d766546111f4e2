"""Answers that somebody might give to the exercises of notebook 01; each must fail."""

FORK = "pid = os.fork()\n    if pid == 0:\n        "
EXEC = "try:\n            os.execvp(words[0], words)\n        finally:\n"

WRONG: dict[str, list[str]] = {
    "01.1": [
        "def start(words, directory, variables):\n    return subprocess.Popen(words, cwd=directory).pid",
        "def start(words, directory, variables):\n    return subprocess.Popen(words, env=variables).pid",
        "def start(words, directory, variables):\n"
        "    return subprocess.Popen(words, cwd=directory, env=os.environ | variables).pid",
        f"def start(words, directory, variables):\n    {FORK}os.chdir(directory)\n"
        "        os.execv(words[0], words)\n    return pid",
        "def start(words, directory, variables):\n    os.chdir(directory)\n"
        "    return subprocess.Popen(words, env=variables).pid",
        "def start(words, directory, variables):\n"
        "    return subprocess.Popen(['sh', '-c', ' '.join(words) + '; :'], cwd=directory, env=variables).pid",
        f"def start(words, directory, variables):\n    {FORK}os.chdir(directory)\n"
        "        os.execve(words[0], words, variables)\n    return os.getpid()",
        "def start(words, directory, variables):\n"
        "    subprocess.run(['timeout', '0.1', *words], cwd=directory, env=variables)\n    return 4242",
        "def start(words, directory, variables):\n    os.chdir(directory)\n    os.execve(words[0], words, variables)",
    ],
    "01.2": [
        "def my_namespaces():\n    return {'mnt': 4026531841}",
        "def my_namespaces():\n"
        "    return {k: os.stat(f'/proc/self/ns/{k}').st_ino for k in os.listdir('/proc/self/ns')}",
        "FOUND = {k: os.stat(f'/proc/self/ns/{k}').st_ino for k in namespaces.FLAGS}\n"
        "def my_namespaces():\n    return FOUND",
        "def my_namespaces():\n    return namespaces.inodes(os.getppid())",
        "def my_namespaces():\n    return {k: os.readlink(f'/proc/self/ns/{k}') for k in namespaces.FLAGS}",
        "def my_namespaces():\n    return {k: os.lstat(f'/proc/self/ns/{k}').st_ino for k in namespaces.FLAGS}",
        "def my_namespaces():\n    print(os.listdir('/proc/self/ns'))",
    ],
    "01.3": [
        "def run(words):\n    return 0",
        "def run(words):\n    try:\n        return subprocess.run(words).returncode\n"
        "    except FileNotFoundError:\n        return 127",
        "def run(words):\n    code = subprocess.run(words).returncode\n    return code if code >= 0 else 128 - code",
        f"def run(words):\n    {FORK}os.execvp(words[0], words)\n    return os.waitpid(pid, 0)[1] >> 8",
        f"def run(words):\n    {FORK}{EXEC}            os._exit(1)\n"
        "    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n    return code if code >= 0 else 128 - code",
        f"def run(words):\n    {FORK}{EXEC}            os._exit(127)\n"
        "    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)\n"
        "    return ended.si_status if ended.si_code == os.CLD_EXITED else 128 + ended.si_status",
        f"def run(words):\n    {FORK}try:\n            os.execvp(words[0], words)\n        except FileNotFoundError:\n"
        "            return 127\n"
        "    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])\n    return code if code >= 0 else 128 - code",
    ],
}
