#!/usr/bin/env bash
# provision.sh: make this machine the lab. For a virtual machine or WSL2, with Ubuntu 24.04 or 26.04, or Debian 12 or 13.
#
#   sudo vm/provision.sh
#
# Installs what `make lab` does: the system packages, the environment from the lock, the lab's root file system. With
# systemd, JupyterLab becomes a service. It says what it changes; a second run changes nothing. How it is undone
# is told in vm/README.md. Settings, from the environment:
#
#   LAB_USER      whose lab it is; else who called sudo, else the user with the id 1000, else root
#   LAB_DIR       where the project is to be: where it is, if that is in the user's home; else it is copied to
#                 ~/containers-from-scratch. What is there already is left as it is: it may have your work in it.
#   LAB_ADDRESS   the address on which JupyterLab listens: 127.0.0.1, or 0.0.0.0 in a VM whose port is forwarded
#   LAB_PORT      8888
#   WHEELS        a directory with the locked packages, for a machine without a network
set -euo pipefail
umask 022

project=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
user=${LAB_USER:-${SUDO_USER:-$(getent passwd 1000 | cut -d: -f1)}}
user=${user:-root}
address=${LAB_ADDRESS:-127.0.0.1}
port=${LAB_PORT:-8888}
settings=/etc/labkernel
service=labkernel-jupyter.service

say() { echo "=> $*"; }
die() { echo "provision.sh: $*" >&2 && exit 1; }

main() {
    [ "$(id -u)" -eq 0 ] || die "has to install packages: sudo $0"
    id "$user" >/dev/null || die "there is no user $user (LAB_USER says whose lab it is)"
    home=$(getent passwd "$user" | cut -d: -f6)

    install_packages
    allow_user_namespaces
    give_subuids
    place_project
    set_up_project
    if [ ! -d /run/systemd/system ]; then
        say "no systemd here, so no service: start JupyterLab with \`make lab\` in $directory"
        return
    fi
    delegate_cgroups
    install_service
    wait_for_answer
    say "JupyterLab is up; $user's notebooks are in $directory. \`labkernel-token\` in the VM shows this again:"
    labkernel-token
}

# Packages, the first time with fresh lists if those at hand do not do. A VM's first boot may hold apt's lock.
install_packages() {
    local name missing=() apt=(apt-get --quiet=2 --option DPkg::Lock::Timeout=600)
    local wanted=(make python3 python3-venv ca-certificates)
    [ -d /run/systemd/system ] && wanted+=(dbus-user-session libpam-systemd)
    command -v apt-get >/dev/null || die "knows Debian's and Ubuntu's packages only"
    export DEBIAN_FRONTEND=noninteractive
    for name in "${wanted[@]}"; do
        [ "$(dpkg-query --show --showformat '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || missing+=("$name")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        say "installing ${missing[*]}"
        apt+=(install --yes --no-install-recommends "${missing[@]}")
        "${apt[@]}" >/dev/null 2>&1 || { apt-get --quiet=2 update && "${apt[@]}" >/dev/null; }
    fi
    # And what the project itself asks for; it knows why.
    python3 "$project/scripts/system_packages.py" lab </dev/null
}

# put FILE MODE [GROUP]: have standard input in FILE; tells whether that changed anything.
put() {
    local new
    new=$(mktemp)
    cat >"$new"
    if cmp --silent "$new" "$1" 2>/dev/null && [ "$(stat --format '%a %G' "$1")" = "$2 ${3-root}" ]; then
        rm "$new"
        return 1
    fi
    say "writing $1"
    install -D --mode "$2" --group "${3-root}" "$new" "$1"
    rm "$new"
}

# Ubuntu lets an ordinary user's namespace be made, and then takes every capability in it from its owner.
allow_user_namespaces() {
    local name=kernel.apparmor_restrict_unprivileged_userns
    [ -e "/proc/sys/${name//.//}" ] || return 0
    if put /etc/sysctl.d/60-labkernel.conf 644 <<<"$name = 0" || [ "$(sysctl --values $name)" != 0 ]; then
        sysctl --quiet --load /etc/sysctl.d/60-labkernel.conf
    fi
}

# A range of user and group ids for containers, behind everybody else's.
give_subuids() {
    local first
    [ "$user" != root ] || return 0
    first=$(cat /etc/subuid /etc/subgid 2>/dev/null |
        awk -F: 'BEGIN { first = 100000 } $2 + $3 > first { first = $2 + $3 } END { print first }')
    for kind in uid gid; do
        grep --quiet "^$user:" /etc/sub$kind 2>/dev/null && continue
        say "giving $user the sub${kind}s from $first on"
        usermod "--add-sub${kind}s" "$first-$((first + 65535))" "$user"
    done
}

place_project() {
    case $project/ in
        "$home"/*) directory=${LAB_DIR:-$project} ;;
        *) directory=${LAB_DIR:-$home/containers-from-scratch} ;;
    esac
    [ ! -e "$directory/Makefile" ] || return 0
    say "copying the project to $directory"
    rm -rf "$directory.new"
    install --directory --owner "$user" --group "$(id --group "$user")" "$directory.new"
    # Not what was made on the other side: it may be for another system.
    tar --create --directory "$project" --exclude-from <(sed 's,^/,./,; s,/$,,' "$project/.gitignore") . |
        runuser --user "$user" -- tar --extract --directory "$directory.new"
    mv --no-target-directory "$directory.new" "$directory"
}

as_user() {
    runuser --login --whitelist-environment=WHEELS "$user" --command "cd $(printf %q "$directory") && $1"
}

set_up_project() {
    as_user "make --no-print-directory setup && .venv/bin/labkernel build"
}

# Every controller for the groups of ordinary users, and a systemd of theirs that does not wait for a login.
delegate_cgroups() {
    put /etc/systemd/system/user@.service.d/labkernel.conf 644 <<'END' && systemctl daemon-reload
[Service]
Delegate=cpu cpuset io memory pids
END
    [ -e "/var/lib/systemd/linger/$user" ] && return
    say "letting $user's services run without a login"
    loginctl enable-linger "$user"
}

install_service() {
    local changed=0 id
    id=$(id --user "$user")
    if [ ! -s $settings/token ]; then
        od --address-radix=n --read-bytes=24 --format=x1 /dev/urandom | tr --delete ' \n' |
            put $settings/token 640 "$(id --group --name "$user")"
    fi
    put $settings/jupyter_lab_config.py 644 <<END && changed=1
# JupyterLab as the service $service. Written by vm/provision.sh; the rest of its settings is the project's.
from pathlib import Path

c = get_config()
load_subconfig("$directory/jupyter_config/jupyter_lab_config.py")
c.ServerApp.ip = "$address"
c.ServerApp.port = $port
c.ServerApp.port_retries = 0
c.IdentityProvider.token = Path("$settings/token").read_text().strip()
END
    put /etc/systemd/system/$service 644 <<END && changed=1
[Unit]
Description=JupyterLab with the notebooks "Building your own containers from scratch"
After=network.target user@$id.service
Wants=user@$id.service

[Service]
User=$user
WorkingDirectory=$directory
# The user's own systemd is asked for control groups, over the user's bus.
Environment=XDG_RUNTIME_DIR=/run/user/$id DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/$id/bus
ExecStart=$directory/.venv/bin/python scripts/lab.py --config=$settings/jupyter_lab_config.py
Restart=on-failure
# The groups below its own are the lab's business; a process killed there for its memory is no failure of the service.
Delegate=yes
OOMPolicy=continue

[Install]
WantedBy=multi-user.target
END
    put /usr/local/bin/labkernel-token 755 <<END || true
#!/bin/sh
# labkernel-token [PORT]: where JupyterLab answers, and its token. PORT is where you look from, if its port is
# forwarded to another one. Written by vm/provision.sh.
port=\${1:-$port}
token=\$(cat $settings/token) || exit
for address in $(if [ "$address" = 0.0.0.0 ]; then echo "127.0.0.1 \$(hostname -I)"; else echo "$address"; fi); do
    case \$address in *:*) ;; *) echo "http://\$address:\$port/lab?token=\$token" ;; esac
done
END
    if [ $changed = 1 ]; then systemctl daemon-reload; fi
    systemctl --quiet is-enabled $service >/dev/null || systemctl --quiet enable $service
    if [ $changed = 1 ]; then systemctl restart $service; else systemctl start $service; fi
}

# JupyterLab has started when it answers; that is seconds, and minutes where a processor is emulated.
wait_for_answer() {
    local end=$((SECONDS + 600)) url
    url=http://127.0.0.1:$port/api
    [ "$address" = 0.0.0.0 ] || url=http://$address:$port/api
    until python3 -c 'import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=60)' "$url" 2>/dev/null; do
        if [ $SECONDS -gt $end ] || systemctl --quiet is-failed $service; then
            journalctl --no-pager --lines 20 --unit $service >&2
            die "JupyterLab does not answer at $url; above, what it said last"
        fi
        sleep 1
    done
}

main
