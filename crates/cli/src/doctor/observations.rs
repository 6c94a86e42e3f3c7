//! What the doctor sees.

strake_observe::catalog! {
    /// The observations of the doctor.
    pub static CATALOG;

    /// io_uring cannot be used.
    NoIoUring("doctor.no-io-uring") {}
    text "io_uring cannot be used, so disks cannot be served";
    remedy "set kernel.io_uring_disabled to 0 (sysctl) and use Linux 5.10 or newer; in a container, allow io_uring in its seccomp profile";

    /// userfaultfd cannot be used.
    NoUserfaultfd("doctor.no-userfaultfd") {}
    text "userfaultfd cannot be used, so guest memory cannot be swapped";
    remedy "set vm.unprivileged_userfaultfd to 1 (sysctl) or let the daemon run as root; in a container, allow userfaultfd in its seccomp profile";

    /// Taps cannot be made.
    NoTun("doctor.no-tun") {}
    text "/dev/net/tun cannot be opened, so guests have no network";
    remedy "load the module (`modprobe tun`) and let the daemon's account read and write /dev/net/tun";

    /// Anonymous memory files cannot be made.
    NoMemfd("doctor.no-memfd") {}
    text "memfds cannot be made, so guests have no memory";
    remedy "use a kernel with CONFIG_MEMFD_CREATE; in a container, allow memfd_create in its seccomp profile";

    /// A file system does not do direct I/O.
    NoDirectIo("doctor.no-direct-io") {
        /// The directory.
        directory: String,
    }
    text "the file system of {directory} does not do direct I/O, so disks there go through the page cache";
    remedy "keep images on ext4, xfs, btrfs or a block device (`strake datastore add`)";

    /// A directory cannot be written.
    NotWritable("doctor.not-writable") {
        /// The directory.
        directory: String,
    }
    text "{directory} cannot be written";
    remedy "run `strake doctor` as the daemon's account (often root) to see what the daemon can do, or give the account the directory";

    /// A file system is nearly full.
    LittleSpace("doctor.little-space") {
        /// The directory.
        directory: String,
        /// Bytes free.
        free_bytes: u64,
        /// The same for people.
        free: String,
    }
    text "only {free} are free in the file system of {directory}";
    remedy "free space there, or keep images in another datastore (`strake datastore add`)";

    /// There are no control groups.
    NoCgroups("doctor.no-cgroups") {}
    text "no cgroup file system is mounted, so VMs cannot be given shares of the host";
    remedy "mount cgroup2 at /sys/fs/cgroup";

    /// Only the old control groups are there.
    OldCgroups("doctor.old-cgroups") {
        /// What is there.
        found: String,
    }
    text "control groups are {found}, not version 2";
    remedy "boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 at /sys/fs/cgroup";

    /// Namespaces cannot be made.
    NoNamespaces("doctor.no-namespaces") {
        /// Which.
        which: String,
    }
    text "{which} namespaces cannot be made, so a monitor's jail has a wall less";
    remedy "run the daemon as root, or allow it: sysctl user.max_user_namespaces (above 0), kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0";

    /// Landlock is off.
    NoLandlock("doctor.no-landlock") {}
    text "landlock is not available, so a monitor's jail has a wall less";
    remedy "boot with `lsm=landlock,…` and a kernel with CONFIG_SECURITY_LANDLOCK (Linux 5.13 or newer)";

    /// Seccomp filters are off.
    NoSeccomp("doctor.no-seccomp") {}
    text "seccomp filters are not available, so a monitor's system calls cannot be limited";
    remedy "use a kernel with CONFIG_SECCOMP_FILTER";

    /// No huge pages.
    NoHugePages("doctor.no-huge-pages") {}
    text "no 2 MiB pages are reserved and transparent ones are off for shared memory";
    remedy "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, or reserve some with the sysctl vm.nr_hugepages";

    /// A limit is low.
    LowLimit("doctor.low-limit") {
        /// Its name as in `ulimit`.
        limit: String,
        /// What it is.
        found: u64,
        /// What it should be at least.
        wanted: u64,
        /// How `ulimit` names it.
        option: String,
    }
    text "the limit of {limit} is {found}, less than {wanted}";
    remedy "raise it: `ulimit {option} {wanted}`, or in the daemon's systemd unit";

    /// Little memory is free.
    LittleMemory("doctor.little-memory") {
        /// Bytes available.
        available_bytes: u64,
        /// The same for people.
        available: String,
    }
    text "only {available} of memory are available";
    remedy "stop something else, or give VMs less memory";

    /// The monitor's binary was not found.
    NoMonitor("doctor.no-monitor") {}
    text "strake-vmm is neither beside strake nor named by STRAKE_VMM, so no VM can start";
    remedy "install strake-vmm beside straked, or set STRAKE_VMM to its path for the daemon";

    /// Client and daemon differ.
    VersionsDiffer("doctor.versions-differ") {
        /// The client's.
        client: String,
        /// The daemon's.
        daemon: String,
    }
    text "strake is version {client}, the daemon is version {daemon}";
    remedy "install the same version of both and restart the daemon: VMs keep running";
}
