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
}
