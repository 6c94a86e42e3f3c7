//! What this crate observes.

strake_observe::catalog! {
    /// What goes wrong with guest RAM.
    pub static CATALOG;

    /// A size that no guest can have.
    SizeRefused("memory.size-refused") {
        /// The size in bytes.
        size: u64,
        /// Why not.
        reason: String,
    }
    text "guest RAM of {size} bytes is impossible: {reason}";
    remedy "choose a multiple of 2 MiB between 2 MiB and 255 GiB";

    /// The memfd does not hold what the VM needs.
    MemfdRefused("memory.memfd-refused") {
        /// The size that the VM needs.
        expected: u64,
        /// The size of the file.
        found: u64,
    }
    text "the memfd for guest RAM has {found} bytes, the VM needs {expected}";
    remedy "this is a fault of the daemon: report it with both versions";

    /// The memfd could not be made.
    CreateFailed("memory.create-failed") {
        /// The memfd's name.
        name: String,
        /// Its size in bytes.
        size: u64,
    }
    text "cannot create memfd '{name}' of {size} bytes";
    remedy "free memory on the host or give the VM less";

    /// The memfd could not be mapped.
    MapFailed("memory.map-failed") {
        /// The guest address.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// The mapper's words.
        reason: String,
    }
    text "cannot map {size} bytes of guest RAM for guest address {gpa:#x}: {reason}";
    remedy "raise the monitor's address space limit or give the VM less memory";
}
