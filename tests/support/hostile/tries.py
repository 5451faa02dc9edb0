"""What a hostile task tries: a program without dependencies, which is run inside a container, one process for each try.

Its argument is a JSON object of facts about the world outside. It writes a line for each try: the name, `refused` or
`allowed`, and the reason. What comes past the checks of permissions and fails for another reason counts as allowed.
"""

# mypy: ignore-errors

import ctypes
import errno
import fcntl
import glob
import json
import os
import resource
import signal
import socket
import stat
import struct
import sys

FACTS = json.loads(sys.argv[1])
MACHINE = os.uname().machine
LIBC = ctypes.CDLL(None, use_errno=True)
SECONDS = 10

REFUSALS = {
    *(errno.EPERM, errno.EACCES, errno.EROFS, errno.ENOSYS, errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ENOTDIR),
    *(errno.EOPNOTSUPP, errno.ESRCH, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.ENETUNREACH),
    *(errno.ECONNREFUSED, errno.ENOTTY, errno.EXDEV),
}

# fmt: off
NUMBERS = {
    "x86_64": {
        "ioctl": 16, "mincore": 27, "getpid": 39, "clone": 56, "ptrace": 101, "syslog": 103, "personality": 135,
        "ustat": 136, "sysfs": 139, "vhangup": 153, "pivot_root": 155, "adjtimex": 159, "chroot": 161, "acct": 163,
        "settimeofday": 164, "mount": 165, "umount2": 166, "swapon": 167, "swapoff": 168, "reboot": 169,
        "sethostname": 170, "setdomainname": 171, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176,
        "quotactl": 179, "nfsservctl": 180, "lookup_dcookie": 212, "clock_settime": 227, "kexec_load": 246,
        "add_key": 248, "request_key": 249, "keyctl": 250, "ioprio_set": 251, "unshare": 272, "perf_event_open": 298,
        "fanotify_init": 300, "prlimit64": 302, "open_by_handle_at": 304, "clock_adjtime": 305, "setns": 308,
        "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312, "finit_module": 313, "kexec_file_load": 320,
        "bpf": 321, "userfaultfd": 323, "capset": 126,
    },
    "aarch64": {
        "lookup_dcookie": 18, "ioctl": 29, "ioprio_set": 30, "umount2": 39, "mount": 40, "pivot_root": 41,
        "nfsservctl": 42, "chroot": 51, "vhangup": 58, "quotactl": 60, "acct": 89, "capset": 91, "personality": 92,
        "unshare": 97, "kexec_load": 104, "init_module": 105, "delete_module": 106, "clock_settime": 112, "syslog": 116,
        "ptrace": 117, "reboot": 142, "sethostname": 161, "setdomainname": 162, "settimeofday": 170, "adjtimex": 171,
        "getpid": 172, "add_key": 217, "request_key": 218, "keyctl": 219, "clone": 220, "swapon": 224, "swapoff": 225,
        "perf_event_open": 241, "prlimit64": 261, "fanotify_init": 262, "open_by_handle_at": 265, "clock_adjtime": 266,
        "setns": 268, "process_vm_readv": 270, "process_vm_writev": 271, "kcmp": 272, "finit_module": 273, "bpf": 280,
        "userfaultfd": 282, "kexec_file_load": 294,
    },
}[MACHINE] | {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431,
    "fsmount": 432, "fspick": 433, "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438, "mount_setattr": 442,
    "quotactl_fd": 443,
}
NEW = {
    "mnt": 0x00020000, "cgroup": 0x02000000, "uts": 0x04000000, "ipc": 0x08000000, "user": 0x10000000, "pid": 0x20000000,
    "net": 0x40000000, "time": 0x80,
}
CAPABILITIES = {
    "DAC_READ_SEARCH": 2, "SETPCAP": 8, "LINUX_IMMUTABLE": 9, "NET_BROADCAST": 11, "NET_ADMIN": 12, "NET_RAW": 13,
    "IPC_OWNER": 15, "SYS_MODULE": 16, "SYS_RAWIO": 17, "SYS_CHROOT": 18, "SYS_PTRACE": 19, "SYS_PACCT": 20,
    "SYS_ADMIN": 21, "SYS_BOOT": 22, "SYS_NICE": 23, "SYS_RESOURCE": 24, "SYS_TIME": 25, "SYS_TTY_CONFIG": 26,
    "MKNOD": 27, "LEASE": 28, "AUDIT_WRITE": 29, "AUDIT_CONTROL": 30, "SETFCAP": 31, "MAC_ADMIN": 33, "SYSLOG": 34,
    "AUDIT_READ": 37, "PERFMON": 38, "BPF": 39, "CHECKPOINT_RESTORE": 40,
}
SYSCTLS = (
    "abi/vsyscall32 debug/exception-trace dev/tty/ldisc_autoload fs/file-max fs/inotify/max_user_watches fs/nr_open "
    "fs/protected_hardlinks fs/protected_symlinks fs/suid_dumpable kernel/core_pattern kernel/core_uses_pid "
    "kernel/dmesg_restrict kernel/domainname kernel/hostname kernel/hung_task_timeout_secs kernel/keys/maxkeys "
    "kernel/modprobe kernel/msgmax kernel/panic kernel/panic_on_oops kernel/perf_event_paranoid kernel/pid_max "
    "kernel/poweroff_cmd kernel/printk kernel/randomize_va_space kernel/sem kernel/shmmax kernel/sysrq "
    "kernel/threads-max kernel/unprivileged_bpf_disabled kernel/yama/ptrace_scope net/core/somaxconn "
    "net/ipv4/ip_forward net/ipv4/ip_local_port_range user/max_user_namespaces vm/dirty_ratio vm/drop_caches "
    "vm/mmap_min_addr vm/overcommit_memory vm/panic_on_oom vm/swappiness "
).split()
SYS_FILES = (
    "block/*/queue/read_ahead_kb bus/*/drivers_autoprobe bus/pci/rescan class/net/*/mtu "
    "devices/system/cpu/cpu0/online devices/system/cpu/cpu1/online devices/system/memory/probe "
    "firmware/acpi/interrupts/gpe00 fs/cgroup/cgroup.procs fs/cgroup/*/cgroup.procs fs/cgroup/*/notify_on_release "
    "fs/cgroup/*/release_agent fs/cgroup/*/tasks fs/cgroup/cgroup.kill fs/cgroup/cgroup.subtree_control "
    "kernel/debug/sched/debug kernel/mm/ksm/run kernel/mm/transparent_hugepage/enabled kernel/profiling "
    "kernel/uevent_helper module/*/parameters/* power/state power/wakeup_count "
).split()
DEVICES = {
    "mem": (stat.S_IFCHR, 1, 1), "kmem": (stat.S_IFCHR, 1, 2), "port": (stat.S_IFCHR, 1, 4), "kmsg": (stat.S_IFCHR, 1, 11),
    "null": (stat.S_IFCHR, 1, 3), "tty0": (stat.S_IFCHR, 4, 0), "sda": (stat.S_IFBLK, 8, 0), "loop0": (stat.S_IFBLK, 7, 0),
    "kvm": (stat.S_IFCHR, 10, 232), "fuse": (stat.S_IFCHR, 10, 229), "net/tun": (stat.S_IFCHR, 10, 200),
    "vda": (stat.S_IFBLK, 254, 0), "loop-control": (stat.S_IFCHR, 10, 237), "cuse": (stat.S_IFCHR, 10, 203),
    "vhost-net": (stat.S_IFCHR, 10, 238), "uinput": (stat.S_IFCHR, 10, 223), "hpet": (stat.S_IFCHR, 10, 228),
}
# fmt: on
SESSION, USER_KEYRING, AT_FDCWD = -3, -4, -100

BUFFER = ctypes.create_string_buffer(8)

TRIES = {}


def refuse(text="it is not there"):
    raise OSError(errno.ENOENT, text)


def call(name, *arguments):
    result = LIBC.syscall(NUMBERS[name], *(ctypes.c_long(one) if isinstance(one, int) else one for one in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def add(name, function, *arguments):
    assert name not in TRIES, name
    TRIES[name] = lambda: function(*arguments)


def add_call(category, name, *arguments, label=""):
    if name in NUMBERS:  # not all architectures have all
        add(f"{category}: {name}{label and ' ' + label}", call, name, *arguments)


def write_back(pattern):
    """Write to a file what is in it."""
    paths = glob.glob(pattern) or refuse()
    errors = []
    for path in paths[:200]:
        try:
            file = os.open(path, os.O_WRONLY)
        except OSError as error:
            errors.append(error)
            continue
        try:
            with open(path, "rb") as now:
                content = now.read()
        except OSError:
            return  # it can be written, if not read
        os.write(file, content.split(b"]")[0].rpartition(b"[")[2] if b"[" in content else content)
        return
    raise errors[0]


def can_read(path):
    with open(path, "rb") as file:
        if not file.read(1):
            refuse("it is empty")


def can_write(path):
    os.close(os.open(path, os.O_WRONLY))


def can_list(path):
    if not os.listdir(path):
        refuse("it is empty")


def make(path):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    os.unlink(path)


def has_capability(bit):
    sets = [line.split() for line in open("/proc/self/status") if line.startswith(("CapEff", "CapPrm", "CapAmb"))]
    if not any(int(value, 16) >> bit & 1 for _, value in sets):
        refuse("it is not in the sets")


def gain_privileges():
    if "NoNewPrivs:\t1" in open("/proc/self/status").read():
        refuse("no_new_privs is set")


def fork_with(flags):
    """Make a child by the system call itself; it ends at once."""
    if call("clone", flags | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        os._exit(0)


def clone3_with(flags):
    arguments = struct.pack("=8Q", flags, 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    if call("clone3", arguments, len(arguments)) == 0:
        os._exit(0)


def clone3_by_a_tracer():
    """Let a tracer decide about clone3(2), if the filter leaves that to tracers: ptrace(2), PTRACE_O_TRACESECCOMP."""
    child = os.fork()
    if child == 0:
        call("ptrace", 0, 0, 0, 0)
        os.kill(os.getpid(), signal.SIGSTOP)
        try:
            clone3_with(NEW["user"])
        except OSError:
            os._exit(1)
        os._exit(0)
    os.waitpid(child, 0)
    try:
        call("ptrace", 0x4200, child, 0, 0x80)
        while True:
            call("ptrace", 7, child, 0, 0)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                break
    except OSError:
        os.kill(child, signal.SIGKILL)
        raise
    if os.WEXITSTATUS(status):
        refuse("clone3 failed")


def enter(kind, process):
    with open(f"/proc/{process}/ns/{kind}") as namespace:
        call("setns", namespace.fileno(), 0)


def mount_in_own_namespace(kind):
    call("unshare", NEW["user"] | NEW["mnt"] | NEW["cgroup"])
    os.mkdir(directory := f"{FACTS['scratch']}/mounted-{kind}")
    call("mount", b"none", directory.encode(), kind.encode(), 0, None)


def make_device(name, kind, major, minor):
    path = f"{FACTS['scratch']}/device-{name.replace('/', '-')}"
    os.mknod(path, kind | 0o600, os.makedev(major, minor))
    os.unlink(path)


def open_socket(family, kind, protocol=0):
    with socket.socket(family, kind, protocol):
        pass


def add_link():
    """Ask the kernel for a new network device: RTM_NEWLINK, rtnetlink(7)."""
    attribute = struct.pack("=HH", 8, 1) + b"dum\0"
    attribute = struct.pack("=HH", 4 + len(b"hostile\0"), 3) + b"hostile\0"
    kind = struct.pack("=HH", 4 + 6, 1) + b"dummy\0\0\0"
    info = struct.pack("=HH", 4 + len(kind), 18) + kind
    body = struct.pack("=BxHiII", 0, 0, 0, 0, 0) + attribute + info
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as link:
        link.send(struct.pack("=IHHII", 16 + len(body), 16, 0x605, 1, 0) + body)
        answer = link.recv(4096)
    number = struct.unpack("=i", answer[16:20])[0]
    if number:
        raise OSError(-number, os.strerror(-number))


def connect(family, address):
    with socket.socket(family) as connection:
        connection.settimeout(2)
        connection.connect(address)


def look_up(number):
    os.kill(number, 0)


def sees(text):
    """Find a process by its command line or environment."""
    for path in glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/proc/[0-9]*/environ"):
        try:
            content = open(path, "rb").read()
        except OSError:
            continue
        if text.encode() in content and path.split("/")[2] not in (str(os.getpid()), str(os.getppid())):
            if b"FACTS" not in content:
                return
    refuse("no process has it")


def many_processes():
    children = []
    try:
        for _ in range(FACTS["most_processes"] + 60):
            children.append(os.fork())
            if children[-1] == 0:
                signal.pause()
    except BlockingIOError:
        refuse("fork failed")
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def raise_limit(which):
    soft, hard = resource.getrlimit(which)
    if hard == resource.RLIM_INFINITY:
        refuse("there is no limit")
    resource.setrlimit(which, (soft, hard + 1))


def inherited_descriptors():
    for number in range(3, 256):
        try:
            os.fstat(number)
        except OSError:
            continue
        if number not in OWN_DESCRIPTORS:
            return
    refuse("there is none")


def other_name_of(path):
    os.link(path, f"{FACTS['scratch']}/linked")


def escape(path):
    """Read a secret of this machine by a path that leads out."""
    with open(path, "rb") as file:
        if FACTS["secret"].encode() not in file.read():
            refuse("it is another file")


def append_to(path):
    if not os.path.getsize(path):
        refuse("it is empty")
    with open(path, "ab") as file:
        file.write(b"x")


def add_filter():
    """Become able to watch other processes' exec, as with bpf(2) BPF_PROG_LOAD."""
    call("bpf", 5, struct.pack("=IIQQ", 1, 0, 0, 0) + bytes(100), 124)


def read_terminal_input():
    for number in (0, 1, 2):
        try:
            fcntl.ioctl(number, 0x5412, b"x")
        except OSError as error:
            last = error
        else:
            return
    raise last


def define_keyrings():
    for label, keyring in (("session", SESSION), ("user", USER_KEYRING), ("user session", -5)):
        add_call("keyring", "keyctl", 0, keyring, 0, label=f"get id of {label}")
        add_call("keyring", "keyctl", 6, keyring, 0, 0, label=f"describe {label}")
        add_call("keyring", "keyctl", 11, keyring, 0, 0, label=f"read {label}")
        add_call("keyring", "add_key", b"user", b"hostile", b"x", 1, keyring, label=f"to {label}")
    add_call("keyring", "keyctl", 8, USER_KEYRING, SESSION, label="link user to session")
    add_call("keyring", "keyctl", 1, None, label="join new session")
    add_call("keyring", "keyctl", 10, SESSION, b"user", b"trio-pilot-secret", 0, label="search session")
    add_call("keyring", "keyctl", 10, USER_KEYRING, b"user", b"trio-pilot-secret", 0, label="search user")
    add_call("keyring", "keyctl", 22, -1, SESSION, label="get persistent")
    add_call("keyring", "keyctl", 7, USER_KEYRING, label="clear user")
    add_call("keyring", "request_key", b"user", b"trio-pilot-secret", None, SESSION)
    add("keyring: /proc/keys", can_read, "/proc/keys")


def define_namespaces():
    for kind, flag in NEW.items():
        add_call("namespaces", "unshare", flag, label=kind)
        if kind != "user":
            add_call("namespaces", "unshare", flag | NEW["user"], label=f"user and {kind}")
        if kind != "time":
            add(f"namespaces: clone {kind}", fork_with, flag)
            add(f"namespaces: clone user and {kind}", fork_with, flag | NEW["user"])
            add(f"namespaces: clone3 user and {kind}", clone3_with, flag | NEW["user"])
    add("namespaces: clone3 by a tracer", clone3_by_a_tracer)
    for kind in ("mnt", "cgroup", "uts", "ipc", "pid", "net", "user"):
        add(f"namespaces: enter {kind} of process 1", enter, kind, 1)


def define_mounts():
    place = f"{FACTS['scratch']}/place"
    os.makedirs(place, exist_ok=True)
    target = place.encode()
    for kind in ("tmpfs", "proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue", "debugfs", "ramfs", "securityfs"):
        add_call("mounts", "mount", b"none", target, kind.encode(), 0, None, label=kind)
    for kind in ("cgroup", "cgroup2", "proc", "tmpfs"):
        add(f"mounts: {kind} in a user namespace", mount_in_own_namespace, kind)
    for path in ("/", "/proc/sys", "/dev", "/etc"):
        add_call("mounts", "mount", path.encode(), target, None, 0x1000, None, label=f"bind {path}")
    for path in ("/", "/sys", "/proc", "/etc", "/usr", FACTS["external"]):
        add_call("mounts", "mount", None, path.encode(), None, 0x1020, None, label=f"make {path} writable")
    for path in ("/proc", "/sys", "/dev", "/etc", FACTS["external"]):
        add_call("mounts", "umount2", path.encode(), 2, label=path)
    add_call("mounts", "pivot_root", b".", b".")
    add_call("mounts", "chroot", target)
    add_call("mounts", "open_tree", AT_FDCWD, b"/", 1)
    add_call("mounts", "move_mount", AT_FDCWD, b"/etc", AT_FDCWD, target, 0)
    add_call("mounts", "fsopen", b"tmpfs", 0)
    add_call("mounts", "fspick", AT_FDCWD, b"/", 0)
    add_call("mounts", "mount_setattr", AT_FDCWD, b"/", 0, bytes(32), 32)


def protect_from_the_kill():
    path = "/proc/self/oom_score_adj"
    with open(path) as file:
        score = int(file.read())
    with open(path, "w") as file:
        file.write(str(max(score - 1, -1000)))


def define_kernel_files():
    for name in SYSCTLS:
        add(f"/proc/sys: {name}", write_back, f"/proc/sys/{name}")
    for name in ("sysrq-trigger", "mtrr", "kmsg", "kcore"):
        add(f"/proc: write {name}", can_write, f"/proc/{name}")
    add("/proc: irq", write_back, "/proc/irq/*/smp_affinity")
    add("/proc: irq default", write_back, "/proc/irq/default_smp_affinity")
    add("/proc: bus", lambda: [can_write(path) for path in glob.glob("/proc/bus/pci/*/*") or refuse()])
    for name in ("kcore", "kmsg", "timer_list", "sched_debug", "latency_stats", "timer_stats", "scsi/scsi"):
        add(f"/proc: read {name}", can_read, f"/proc/{name}")
    add("/proc: acpi", can_list, "/proc/acpi")
    add("/proc: asound", can_list, "/proc/asound")
    add("/proc: read kpageflags", can_read, "/proc/kpageflags")
    add("/proc: protect from the kill for memory", protect_from_the_kill)
    for name in SYS_FILES:
        add(f"/sys: {name}", write_back, f"/sys/{name}")
    for name in ("firmware", "kernel/debug", "kernel/tracing", "kernel/security", "devices/virtual/powercap"):
        add(f"/sys: list {name}", can_list, f"/sys/{name}")
    for top in ("/sys/fs/cgroup", "/sys/fs/cgroup/memory", "/sys/fs/cgroup/pids", "/sys/fs/cgroup/unified"):
        add(f"cgroups: make a group in {top}", os.mkdir, f"{top}/hostile")


def define_devices():
    for name, (kind, major, minor) in DEVICES.items():
        add(f"devices: make {name}", make_device, name, kind, major, minor)
        if name != "null":
            add(f"devices: open {name}", lambda path=f"/dev/{name}": os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)))


def define_privileges():
    for name, bit in CAPABILITIES.items():
        add(f"privileges: {name}", has_capability, bit)
    add("privileges: set-uid programs", gain_privileges)
    add("privileges: a file with capabilities", set_capabilities)
    header, everything = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", *[0xFFFFFFFF] * 6)
    add_call("privileges", "capset", header, everything)
    for label, which in (("files", resource.RLIMIT_NOFILE), ("processes", resource.RLIMIT_NPROC)):
        add(f"privileges: raise the limit of {label}", raise_limit, which)
    add("privileges: real-time priority", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)))
    add("privileges: higher priority", lambda: os.setpriority(os.PRIO_PROCESS, 0, -5))
    add_call("privileges", "ioprio_set", 1, 0, 1 << 13, label="real-time")


def set_capabilities():
    path = f"{FACTS['scratch']}/program"
    open(path, "w").close()
    os.setxattr(path, "security.capability", struct.pack("=5I", 0x02000001, 1 << 21, 0, 0, 0))


def define_processes():
    pilot = FACTS["pilot"]
    add("processes: look for the pilot", look_up, pilot)
    add("processes: the pilot's directory", can_list, f"/proc/{pilot}")
    add("processes: the pilot's memory", can_read, f"/proc/{pilot}/mem")
    add("processes: see the secret of another", sees, FACTS["secret"])
    add("processes: its process group", os.killpg, pilot, 0)
    add("processes: its affinity", os.sched_setaffinity, pilot, {0})
    add("processes: its priority", os.setpriority, os.PRIO_PROCESS, pilot, 19)
    add_call("processes", "ptrace", 16, pilot, 0, 0, label="the pilot")
    add_call("processes", "pidfd_open", pilot, 0, label="the pilot")
    add_call("processes", "prlimit64", pilot, 7, None, bytes(16), label="the pilot")
    for name in ("process_vm_readv", "process_vm_writev"):
        vector = struct.pack("=QQ", ctypes.addressof(BUFFER), len(BUFFER))
        add_call("processes", name, pilot, vector, 1, vector, 1, 0, label="the pilot")
    add_call("processes", "kcmp", os.getpid(), os.getpid(), 0, 0, 0)
    add("processes: take a descriptor of process 1", take_descriptor)
    add("processes: inherited descriptors", inherited_descriptors)
    add("processes: more than the limit", many_processes)


def take_descriptor():
    call("pidfd_getfd", call("pidfd_open", 1, 0), 0, 0)


def define_sockets():
    raw = socket.SOCK_RAW
    add("sockets: packets", open_socket, socket.AF_PACKET, raw, 0x300)
    add("sockets: packets, cooked", open_socket, socket.AF_PACKET, socket.SOCK_DGRAM, 0x300)
    for label, protocol in (("ICMP", 1), ("TCP", 6), ("UDP", 17), ("any", 255)):
        add(f"sockets: raw {label}", open_socket, socket.AF_INET, raw, protocol)
        add(f"sockets: raw {label}, version 6", open_socket, socket.AF_INET6, raw, protocol)
    add("sockets: hypervisor", open_socket, 40, socket.SOCK_STREAM)
    add("sockets: Bluetooth", open_socket, 31, raw)
    add("sockets: key management", open_socket, 15, raw, 2)
    add("sockets: XDP", open_socket, 44, raw)
    add("sockets: new network device", add_link)
    add("sockets: an abstract one of the machine", connect, socket.AF_UNIX, f"\0{FACTS['abstract']}")
    add("sockets: a server of the machine", connect, socket.AF_INET, ("127.0.0.1", FACTS["port"]))
    for path in ("/run/docker.sock", "/var/run/docker.sock", "/run/podman/podman.sock", "/run/dbus/system_bus_socket"):
        add(f"sockets: {path}", connect, socket.AF_UNIX, path)
    for path in FACTS["sockets"]:
        add(f"sockets: an engine's own, {os.path.basename(path)}", connect, socket.AF_UNIX, path)
    add("sockets: input to a terminal", read_terminal_input)


def define_kernel_calls():
    zeros = bytes(128)
    add("kernel: bpf program", add_filter)
    add_call("kernel", "bpf", 0, struct.pack("=5I", 1, 4, 4, 1, 0) + zeros, 72, label="map")
    add_call("kernel", "perf_event_open", struct.pack("=II", 1, 112) + zeros, 0, -1, -1, 0)
    add_call("kernel", "userfaultfd", 0)
    add_call("kernel", "io_uring_setup", 1, ctypes.create_string_buffer(120))
    add_call("kernel", "kexec_load", 0, 0, None, 0)
    add_call("kernel", "kexec_file_load", -1, -1, 0, None, 0)
    add_call("kernel", "init_module", None, 0, b"")
    add_call("kernel", "finit_module", -1, b"", 0)
    add_call("kernel", "delete_module", b"hostile", 0)
    add_call("kernel", "reboot", 0, 0, 0, None)
    add_call("kernel", "swapon", b"/nowhere", 0)
    add_call("kernel", "swapoff", b"/nowhere")
    add_call("kernel", "acct", None)
    add_call("kernel", "quotactl", 0x800002 << 8, b"/nowhere", 0, None)
    add_call("kernel", "settimeofday", struct.pack("=qq", -1, -1), None)
    add_call("kernel", "clock_settime", 0, struct.pack("=qq", -1, -1))
    add_call("kernel", "adjtimex", struct.pack("=Q", 2) + bytes(300))
    add_call("kernel", "clock_adjtime", 0, struct.pack("=Q", 2) + bytes(300))
    add_call("kernel", "syslog", 3, ctypes.create_string_buffer(64), 64, label="read")
    add_call("kernel", "syslog", 5, None, 0, label="clear")
    add_call("kernel", "open_by_handle_at", AT_FDCWD, struct.pack("=Ii", 8, 1) + zeros, 0)
    add_call("kernel", "lookup_dcookie", 0, zeros, 0)
    add_call("kernel", "nfsservctl", 0, None, None)
    add_call("kernel", "iopl", 3)
    add_call("kernel", "ioperm", 0, 1, 1)
    add_call("kernel", "personality", 0x0040000, label="no randomization")
    add_call("kernel", "personality", 0x0400000, label="executable data")
    add_call("kernel", "sethostname", b"hostile", 7)
    add_call("kernel", "setdomainname", b"hostile", 7)
    add_call("kernel", "vhangup")
    add_call("kernel", "fanotify_init", 0, 0)
    add_call("kernel", "sysfs", 3)
    if MACHINE == "x86_64":
        NUMBERS["getpid of x32"] = 0x40000000 + 39
        add_call("kernel", "getpid of x32")


def define_files():
    external, hub, data = FACTS["external"], FACTS["hub"], FACTS["data"]
    for path in FACTS["secrets"]:
        add(f"files: read the pilot's {os.path.basename(path)}", escape, path)
        add(f"files: the same by process 1, {os.path.basename(path)}", escape, f"/proc/1/root{path}")
        add(f"files: write the pilot's {os.path.basename(path)}", append_to, path)
    add("files: list the data directory", can_list, data)
    add("files: read a file of another task", can_read, f"{data}/another-task/task-io/infile")
    for label, top in (("an external directory", external), ("the data hub", hub)):
        there = f"{top}/file"
        add(f"files: make one in {label}", make, f"{top}/made")
        add(f"files: make a directory in {label}", os.mkdir, f"{top}/made-directory")
        add(f"files: make a link in {label}", os.symlink, "/", f"{top}/made-link")
        add(f"files: write in {label}", can_write, there)
        add(f"files: truncate in {label}", os.truncate, there, 0)
        add(f"files: delete in {label}", os.unlink, there)
        add(f"files: rename in {label}", os.rename, there, f"{top}/renamed")
        add(f"files: change the mode in {label}", os.chmod, there, 0o777)
        add(f"files: change the owner in {label}", os.chown, there, os.getuid(), os.getgid())
        add(f"files: change the time in {label}", os.utime, there)
        add(f"files: an attribute in {label}", os.setxattr, there, "user.hostile", b"x")
        add(f"files: another name of one in {label}", other_name_of, there)
        add(f"files: a device in {label}", os.mknod, f"{top}/device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    for path in ("/", "/etc", "/usr", "/bin", "/var", "/ewms-pilot-data", "/sys", "/proc"):
        add(f"files: make one in {path}", make, f"{path}/hostile-{os.getpid()}")
    for path in ("/proc/self/root/..", "/proc/1/cwd/..", "../" * 40):
        add(f"files: leave by {path[:20]}", escape, f"{path}/{FACTS['secrets'][0]}")


OWN_DESCRIPTORS = set()


def main():
    for define in (
        *(define_keyrings, define_namespaces, define_mounts, define_kernel_files, define_devices, define_privileges),
        *(define_processes, define_sockets, define_kernel_calls, define_files),
    ):
        define()
    for name, function in TRIES.items():
        print(f"{name}\t{attempt(function)}", flush=True)


def attempt(function):
    """Run a try in a process of its own; return `refused` or `allowed`, and why."""
    reading, writing = os.pipe()
    OWN_DESCRIPTORS.update((reading, writing))
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(SECONDS)
        os.write(writing, judge(function).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if said:
        return said
    killer = os.WTERMSIG(status)
    return f"{'allowed' if killer == signal.SIGALRM else 'refused'}\tended by signal {killer}"


def judge(function):
    try:
        function()
    except OSError as error:
        verdict = "refused" if error.errno in REFUSALS else "allowed"
        return f"{verdict}\t{error.strerror}"
    return "allowed\tit worked"


main()
