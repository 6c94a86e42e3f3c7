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
