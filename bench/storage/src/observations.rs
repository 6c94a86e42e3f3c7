//! What the benches observe.

strake_observe::catalog! {
    /// Every kind of observation of this crate.
    pub(crate) static CATALOG;

    /// A step of a bench failed.
    StepFailed("bench.step-failed") {
        /// What was being done.
        step: String,
        /// Why not.
        reason: String,
    }
    text "{step}: {reason}";
    remedy "check that the directory has room for three images (--dir) and that nothing else uses its device, then run the bench again";

    /// The peer is not installed.
    NoPeer("bench.no-peer") {
        /// Its program.
        program: String,
        /// Why it does not run.
        reason: String,
    }
    text "{program} does not run: {reason}";
    remedy "install it (Debian: apt-get install qemu-utils) or set STRAKE_BENCH_QSD to its path";

    /// There is no room for the images.
    NoRoom("bench.no-room") {
        /// Where.
        path: String,
        /// How many bytes are free there.
        free: u64,
        /// How many are needed.
        needed: u64,
    }
    text "{free} bytes are free in {path}, the bench needs {needed}";
    remedy "choose a directory with more room (--dir) or a smaller disk (--size-mib)";

    /// A disk did not hold what its guest had been told is written.
    DataLost("bench.data-lost") {
        /// How many sectors, over all runs of one side.
        sectors: u64,
        /// Which side.
        side: String,
    }
    text "{sectors} sectors do not hold what was acknowledged: {side}";
    remedy "do not trust the figures; if the side is strake, report this with the whole output";

    /// The client saw an error of the disk.
    ClientFailed("bench.client-failed") {
        /// What was being done.
        step: String,
        /// Why not.
        reason: String,
    }
    text "the vhost-user client failed: {step}: {reason}";
    remedy "look at the server's own messages above";
}
