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

    /// The kernel lacks what the pager needs.
    UffdLacks("memory.uffd-lacks") {
        /// What.
        what: String,
    }
    text "this host's kernel cannot page guest memory: it lacks one of: {what}";
    remedy "run Linux 6.7 or later, or give the VM no resident limit and no swap";

    /// The pager could not be begun.
    PagerFailed("memory.pager-failed") {
        /// At what.
        step: String,
    }
    text "the pager of guest memory cannot be started: {step}";
    remedy "see the cause";

    /// A limit that cannot be kept.
    LimitRefused("memory.limit-refused") {
        /// The limit in bytes.
        limit: u64,
        /// The least that is possible.
        least: u64,
    }
    text "a resident limit of {limit} bytes is too low: at least {least} bytes are needed";
    remedy "raise the resident limit";

    /// The swap file is something else.
    NotASwapFile("memory.not-a-swap-file") {
        /// Its path.
        path: String,
        /// Why.
        reason: String,
    }
    text "{path} is no swap file of this program: {reason}";
    remedy "remove the file if nothing else needs it, or choose another path";

    /// The swap file belongs to another VM.
    SwapOfAnother("memory.swap-of-another") {
        /// Its path.
        path: String,
        /// Whose it is.
        owner: String,
        /// Who wanted it.
        vm: String,
    }
    text "{path} is the swap file of VM '{owner}', not of this VM '{vm}'";
    remedy "give each VM a swap file of its own";

    /// Somebody uses the swap file.
    SwapBusy("memory.swap-busy") {
        /// Its path.
        path: String,
    }
    text "the swap file {path} is in use";
    remedy "stop the VM that uses it; `strake ps` shows which run";

    /// The swap file could not be made ready.
    SwapUnusable("memory.swap-unusable") {
        /// Its path.
        path: String,
    }
    text "the swap file {path} cannot be made ready";
    remedy "see the cause; choose another datastore or a smaller swap file";

    /// Nothing more can be swapped out.
    SwapFull("memory.swap-full") {
        /// The file's path.
        path: String,
        /// What is in it.
        bytes: u64,
    }
    text "the swap file {path} takes no more than the {bytes} bytes that are in it";
    remedy "free space on its datastore, raise the VM's resident limit, or enlarge the swap file";

    /// A page could not be swapped out.
    SwapWriteFailed("memory.swap-write-failed") {
        /// The file's path.
        path: String,
        /// Where in it.
        offset: u64,
    }
    text "cannot write to the swap file {path} at {offset}";
    remedy "repair the swap file's datastore; the guest waits if it needs more memory than its limit";

    /// A page could not be swapped in.
    SwapReadFailed("memory.swap-read-failed") {
        /// The file's path.
        path: String,
        /// Where in it.
        offset: u64,
    }
    text "cannot read the swap file {path} at {offset}";
    remedy "repair the swap file's datastore: the guest goes on when its memory can be read";

    /// A slot holds something else than was written.
    SwapChecksum("memory.swap-checksum") {
        /// The file's path.
        path: String,
        /// Where in it.
        offset: u64,
    }
    text "the swap file {path} holds at {offset} something else than was written there";
    remedy "the guest's memory cannot be had: restore the datastore, or power the VM off";

    /// There is nowhere to evict to.
    NoSwap("memory.no-swap") {
        /// How many pages should go.
        pages: u64,
    }
    text "{pages} pages should leave memory, and the VM has no swap file";
    remedy "give the VM a swap file or raise its resident limit";

    /// A compressed page does not unpack.
    TierBroken("memory.tier-broken") {
        /// The page.
        page: u64,
    }
    text "page {page} of the guest's memory does not unpack";
    remedy "the host's memory or this program is at fault: report it, and test the memory";

    /// A page's content is nowhere.
    PageLost("memory.page-lost") {
        /// The page.
        page: u64,
    }
    text "nobody knows where page {page} of the guest's memory is";
    remedy "this is a fault of the program: report it with the monitor's log";

    /// The disk that holds a page does not answer.
    DiskCopyLost("memory.disk-copy-lost") {
        /// The page.
        page: u64,
    }
    text "page {page} of the guest's memory is held by a disk that cannot be read";
    remedy "repair the disk's datastore: the guest goes on when the page can be read";

    /// The kernel refuses what it must not refuse.
    PagerBroken("memory.pager-broken") {
        /// The page, as far as it is about one.
        page: u64,
    }
    text "the pager cannot serve page {page} of the guest's memory";
    remedy "see the cause; if the host is short of memory, free some";
}
