//! What this crate observes.

strake_observe::catalog! {
    /// Every kind of observation of this crate.
    pub static CATALOG;

    /// The host has no usable io_uring.
    NoUring("block.no-io-uring") {
        /// Why, in the system's words.
        reason: String,
    }
    text "io_uring cannot be set up: {reason}";
    remedy "enable it (sysctl kernel.io_uring_disabled=0), raise the limit of locked memory (ulimit -l) or of open files, or use a kernel from 5.11 on";

    /// The ring refuses to go on.
    RingBroken("block.ring-broken") {
        /// The image it belongs to.
        path: String,
    }
    text "the I/O ring of {path} does not accept requests";
    remedy "look at the kernel's log; restart the VM to open the disk again";

    /// What was given as an image is none.
    NotAnImage("block.not-an-image") {
        /// The path.
        path: String,
        /// What it is instead.
        what: String,
    }
    text "{path} cannot be a disk image: it is {what}";
    remedy "give a regular file or a block device of at least 512 bytes";

    /// Reading an image failed.
    ReadFailed("block.read-failed") {
        /// The path of the image.
        path: String,
        /// Where it began, in bytes.
        offset: u64,
        /// How many bytes.
        length: u64,
        /// The error number.
        errno: i32,
        /// What can be done.
        advice: String,
    }
    text "reading {length} bytes of {path} at offset {offset} failed (errno {errno})";
    remedy "{advice}";

    /// Changing an image failed.
    WriteFailed("block.write-failed") {
        /// The path of the image.
        path: String,
        /// What was being done: write, discard or write-zeroes.
        operation: String,
        /// Where it began, in bytes.
        offset: u64,
        /// How many bytes.
        length: u64,
        /// The error number.
        errno: i32,
        /// What can be done.
        advice: String,
    }
    text "{operation} of {length} bytes of {path} at offset {offset} failed (errno {errno})";
    remedy "{advice}";

    /// Flushing an image failed.
    FlushFailed("block.flush-failed") {
        /// The path of the image.
        path: String,
        /// The error number.
        errno: i32,
        /// What can be done.
        advice: String,
    }
    text "flushing {path} failed (errno {errno}): writes since the last flush may be lost";
    remedy "{advice}";

    /// A request lies outside of its image or is not made of sectors.
    BadRequest("block.bad-request") {
        /// The path of the image.
        path: String,
        /// What was being done.
        operation: String,
        /// Where it begins, in bytes.
        offset: u64,
        /// How many bytes.
        length: u64,
        /// The image's size.
        size: u64,
    }
    text "{operation} of {length} bytes at offset {offset} is outside of {path} ({size} bytes) or not in sectors";
    remedy "the guest's driver is at fault: check the guest";

    /// A request would change a disk that may only be read.
    ReadOnlyDisk("block.read-only") {
        /// The path of the image.
        path: String,
        /// What was being done.
        operation: String,
    }
    text "{operation} on {path}, which is read-only";
    remedy "give the VM the disk without read-only, or mount it read-only in the guest";

    /// A migration ended without moving the disk.
    MigrationFailed("block.migration-failed") {
        /// The job.
        job: String,
        /// The disk's name.
        disk: String,
        /// The path that it stays on.
        source: String,
        /// The path that it was to move to.
        destination: String,
    }
    text "job {job}: disk '{disk}' was not moved to {destination}; it stays on {source}, nothing of it is lost";
    remedy "do what the cause below asks for, then start the migration again";

    /// The destination is smaller than the disk.
    DestinationTooSmall("block.destination-too-small") {
        /// The path of the destination.
        path: String,
        /// Its size.
        size: u64,
        /// The disk's size.
        needed: u64,
    }
    text "{path} has {size} bytes, the disk needs {needed}";
    remedy "make the destination at least {needed} bytes large";

    /// The disk is too large to be migrated.
    DiskTooLarge("block.disk-too-large") {
        /// The disk's name.
        disk: String,
        /// The path of its image.
        path: String,
        /// Its size in bytes.
        size: u64,
        /// The most that can be migrated, in bytes.
        most: u64,
    }
    text "{path}, the image of disk '{disk}', has {size} bytes; a disk of at most {most} can be migrated";
    remedy "stop the VM, shrink the image to what its guest uses and no more than {most} bytes, and start the VM again";

    /// There is no memory to follow what the guest writes.
    NoBitmap("block.no-bitmap") {
        /// How many bytes it needs.
        bytes: u64,
        /// How large the disk is.
        size: u64,
    }
    text "there is no memory for a bitmap of {bytes} bytes, which a disk of {size} bytes needs to be migrated";
    remedy "free memory of the host, raise the monitor's limit of memory if it has one, then start the migration again; a job needs four of these bitmaps";

    /// The destination's file was removed.
    DestinationRemoved("block.destination-removed") {
        /// The path of the destination.
        path: String,
    }
    text "the destination {path} was removed while the disk was being copied to it";
    remedy "find out what removed it, then start the migration again";

    /// Another migration has the disk.
    AlreadyMigrating("block.already-migrating") {
        /// The disk's name.
        disk: String,
    }
    text "disk '{disk}' is already being migrated";
    remedy "wait for that job or cancel it";

    /// The guest writes faster than the copy can follow.
    NotConverging("block.not-converging") {
        /// How many passes were made.
        passes: u32,
        /// Bytes per second that the guest dirtied, counted in whole blocks.
        write_rate: u64,
        /// Bytes per second that were copied.
        copy_rate: u64,
        /// Bytes left after the last pass.
        dirty: u64,
        /// What the pause would have been, in milliseconds.
        expected_pause_ms: u64,
        /// The pause allowed, in milliseconds.
        pause_ms: u64,
    }
    text "after {passes} passes {dirty} bytes are left: the guest dirties {write_rate} bytes per second, {copy_rate} are copied; the pause would be {expected_pause_ms} ms, {pause_ms} ms are allowed";
    remedy "allow a longer pause, raise or remove the rate limit, migrate when the guest writes less, or choose a faster destination";

    /// The last blocks could not be copied within the allowed pause.
    PauseTooLong("block.pause-too-long") {
        /// How often it was tried.
        attempts: u32,
        /// How long the last attempt took before it was given up, in milliseconds.
        took_ms: u64,
        /// The pause allowed, in milliseconds.
        pause_ms: u64,
    }
    text "{attempts} attempts to switch over did not end within the allowed pause of {pause_ms} ms; the last was given up after {took_ms} ms";
    remedy "allow a longer pause, or migrate when source and destination are less busy";

    /// The destination hung again and again while the guest's writes went to it.
    MirrorStalled("block.mirror-stalled") {
        /// The path of the destination.
        path: String,
        /// How often.
        times: u32,
    }
    text "{path} did not answer {times} times while the guest's writes were being mirrored to it";
    remedy "look at the health of the destination, or use the method dirty, which never lets the guest wait for it";

    /// A pause was ended although a device had not answered.
    SwitchStalled("block.switch-stalled") {
        /// The job.
        job: String,
        /// The disk's name.
        disk: String,
        /// How long the guest had waited, in milliseconds.
        after_ms: u64,
    }
    text "job {job}: a device did not answer while disk '{disk}' was being switched over; its guest goes on since {after_ms} ms on the source, the job waits for the device";
    remedy "look at the health of source and destination; cancel the job if it does not go on";

    /// The daemon did not commit.
    CommitRefused("block.commit-refused") {
        /// The job.
        job: String,
    }
    text "the inventory did not bind the disk of job {job} to its destination";
    remedy "look at the daemon's observations for the reason";

    /// A snapshot was not taken.
    CoverFailed("block.snapshot-failed") {
        /// The job.
        job: String,
        /// The disk's name.
        disk: String,
        /// The path that it stays on.
        source: String,
    }
    text "job {job}: no snapshot of disk '{disk}' was taken; it stays on {source}, nothing of it is lost";
    remedy "do what the cause below asks for, then take the snapshot again";

    /// A job was cancelled when its outcome was no longer the monitor's to decide.
    CancelTooLate("block.cancel-too-late") {
        /// The job.
        job: String,
    }
    text "job {job} can no longer be cancelled: its commit is being decided";
    remedy "wait for the job to end, then migrate the disk back if it must be";

    /// The file of a job's claims cannot be written.
    KeptUnwritable("block.kept-unwritable") {
        /// The path of the source.
        source: String,
    }
    text "the progress of the migration of {source} cannot be kept beside it";
    remedy "free space on the source's datastore and check that it is writable";

    /// The file of a job's claims cannot be used.
    KeptDamaged("block.kept-damaged") {
        /// What is wrong.
        why: String,
    }
    text "the kept progress of the migration cannot be used: {why}";
    remedy "the disk is on its source; cancel the job and start the migration again";

    /// A job was to be paused when its outcome was no longer the monitor's to decide.
    PauseTooLate("block.pause-too-late") {
        /// The job.
        job: String,
    }
    text "job {job} can no longer be paused: its commit is being decided, or an overlay would grow beyond its limit";
    remedy "wait for the job to end";

    /// The journal beside the destination cannot be written.
    JournalUnwritable("block.journal-unwritable") {
        /// The path of the destination.
        destination: String,
    }
    text "the journal of the migration to {destination} cannot be written";
    remedy "free space on the destination's datastore and check that it is writable";

    /// A journal holds no whole record.
    JournalDamaged("block.journal-damaged") {
        /// What is wrong.
        why: String,
    }
    text "the migration's journal cannot be used: {why}";
    remedy "the disk is on the image that the inventory names; remove the journal and, if the inventory does not name it, the destination beside it";

    /// A journal was written by another version.
    JournalVersion("block.journal-version") {
        /// Its version.
        version: u32,
        /// The version that is known.
        known: u32,
    }
    text "the migration's journal has version {version}, only {known} is known here";
    remedy "use the version of strake that wrote it";

    /// An image cannot be opened in another process before this one has closed it.
    ImageStays("block.image-stays") {
        /// Its path.
        path: String,
    }
    text "image {path} is of a kind that cannot be handed to another monitor while it is in use";
    remedy "restart the VM without --fast";

    /// A job with method `snapshot` was given no overlay.
    NoOverlay("block.no-overlay") {
        /// The job.
        job: String,
    }
    text "job {job} has no overlay, which method snapshot needs";
    remedy "ask for another method (--method)";

    /// The overlay of a migration got as large as it may.
    OverlayFull("block.overlay-full") {
        /// The path of the overlay.
        path: String,
        /// How large it is.
        bytes: u64,
        /// Its limit.
        limit: u64,
    }
    text "the guest wrote {bytes} bytes to {path} before its disk was copied; {limit} are allowed, and all of it was to fit when it is consolidated";
    remedy "allow more (--delta-limit), or use --method mirror, which needs no space";

    /// A disk was left on the overlay of a migration.
    LeftOnOverlay("block.left-on-overlay") {
        /// The disk's name.
        disk: String,
        /// The path of the overlay.
        overlay: String,
        /// The path of what it is over.
        below: String,
    }
    text "disk '{disk}' is on {overlay} over {below} now; nothing of it is lost, and both are needed";
    remedy "put them together: strake disk consolidate VM {disk}";
}
