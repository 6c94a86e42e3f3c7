//! What this crate observes.

strake_observe::catalog! {
    /// The observations of `strake-arch`.
    pub static CATALOG;

    /// The machine's shape is out of bounds.
    CpuCount("arch.cpu-count") {
        /// How many were asked for.
        cpus: u8,
        /// How many are possible.
        most: u8,
    }
    text "a guest with {cpus} vCPUs cannot be described";
    remedy "ask for 1 to {most} vCPUs";

    /// The guest's RAM cannot be laid out.
    RamSize("arch.ram-size") {
        /// How many bytes were asked for.
        bytes: u64,
        /// Why not.
        reason: String,
    }
    text "{bytes} bytes of RAM cannot be laid out: {reason}";
    remedy "give a multiple of 4 KiB between 32 MiB and 255 GiB";

    /// The kernel file is something else.
    NotAKernel("arch.not-a-kernel") {
        /// What it looks like.
        found: String,
        /// What it lacks.
        reason: String,
    }
    text "the kernel file is {found}: {reason}";
    remedy "give an x86-64 Linux kernel: a bzImage (a distribution's /boot/vmlinuz-*) or an ELF vmlinux with a PVH note (CONFIG_PVH=y)";

    /// The kernel is one, but its headers contradict the file or the machine.
    KernelDamaged("arch.kernel-damaged") {
        /// The kind of kernel.
        format: String,
        /// What is wrong with it.
        reason: String,
    }
    text "the {format} kernel is damaged: {reason}";
    remedy "copy or install the kernel file again and compare its checksum with the package's";

    /// The kernel is too large for the guest's RAM.
    KernelDoesNotFit("arch.kernel-does-not-fit") {
        /// The last address that it needs, plus one.
        needed: u64,
        /// Where RAM that it may use ends.
        available: u64,
    }
    text "the kernel needs memory up to {needed:#x}, the guest's RAM for it ends at {available:#x}";
    remedy "give the VM more memory";

    /// The initial RAM disk is too large.
    InitrdDoesNotFit("arch.initrd-does-not-fit") {
        /// Its size.
        bytes: u64,
        /// How much room there is beside the kernel.
        available: u64,
    }
    text "the initial RAM disk has {bytes} bytes, beside the kernel there is room for {available}";
    remedy "give the VM more memory, or make a smaller initial RAM disk (MODULES=dep)";

    /// The command line is too long.
    CommandLineTooLong("arch.command-line-too-long") {
        /// Its length in bytes.
        bytes: u64,
        /// The kernel's limit.
        most: u64,
    }
    text "the kernel's command line has {bytes} bytes, this kernel takes {most}";
    remedy "shorten the command line";

    /// The command line cannot be passed.
    CommandLineInvalid("arch.command-line-invalid") {
        /// The offset of the first offending byte.
        offset: u64,
    }
    text "the kernel's command line has a zero byte at offset {offset}";
    remedy "remove the zero byte; what follows it would never reach the kernel";

    /// A boot file could not be read or copied into the guest.
    BootReadFailed("arch.boot-read-failed") {
        /// Which file.
        what: String,
    }
    text "the {what} could not be read";
    remedy "check the file and the store it is on";

    /// Something of the boot protocol could not be written to the guest's RAM.
    BootWriteFailed("arch.boot-write-failed") {
        /// What was written.
        what: String,
        /// Where.
        address: u64,
        /// The reason.
        reason: String,
    }
    text "the {what} could not be written to the guest's memory at {address:#x}: {reason}";
    remedy "report it as a defect: the guest's memory does not match its layout";

    /// The disk image has no kernel that could be booted.
    NoBootableSystem("arch.no-bootable-system") {
        /// What was looked at, one phrase per partition.
        looked_at: String,
    }
    text "no bootable Linux system was found on the disk: {looked_at}";
    remedy "use a disk with a kernel on ext4 (a boot entry, /vmlinuz, or /boot/vmlinuz-*), or give kernel and initrd files with boot.from = \"kernel\"";

    /// The search of a disk image for a kernel did not end.
    DiskSearchEnded("arch.disk-search-ended") {
        /// How: it took too long, or it failed inside.
        how: String,
    }
    text "the search of the disk for a kernel was given up: {how}";
    remedy "check the disk's file systems (e2fsck), or give kernel and initrd files with boot.from = \"kernel\"";

    /// A partition of the disk could not be used.
    PartitionUnusable("arch.partition-unusable") {
        /// Which one: `partition 1` or `the whole disk`.
        partition: String,
        /// Why not.
        reason: String,
    }
    text "{partition} has no usable file system: {reason}";
    remedy "if the kernel is on it, put /boot on ext2, ext3 or ext4";

    /// A file system was not unmounted, and its journal is of a kind that is not replayed here.
    JournalSkipped("arch.journal-skipped") {
        /// Which partition.
        partition: String,
        /// Why not.
        reason: String,
    }
    text "the journal of {partition} is not replayed, its last changes are not seen: {reason}";
    remedy "if a kernel that was just installed is not found, let the guest shut down cleanly once, or run e2fsck on the image";

    /// A boot entry names something that is not there, or too large.
    BootEntryUnusable("arch.boot-entry-unusable") {
        /// The entry: its file and title.
        entry: String,
        /// Why it cannot be used.
        reason: String,
    }
    text "boot entry {entry} cannot be used: {reason}";
    remedy "repair the guest's boot loader configuration, or give kernel and initrd files with boot.from = \"kernel\"";

    /// A file of the disk's file system could not be read.
    DiskFileUnusable("arch.disk-file-unusable") {
        /// Its path within the file system.
        path: String,
        /// Where the file system is.
        partition: String,
        /// Why not.
        reason: String,
    }
    text "{path} on {partition} cannot be read: {reason}";
    remedy "check the file system (e2fsck) and the guest's boot loader configuration";
}
