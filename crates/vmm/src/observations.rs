//! What this crate observes.

strake_observe::catalog! {
    /// What goes wrong around a monitor.
    pub(crate) static CATALOG;

    /// The command line is wrong.
    BadArguments("vmm.bad-arguments") {
        /// What is wrong.
        reason: String,
    }
    text "the command line is wrong: {reason}";
    remedy "monitors are started by straked; `strake-vmm --help` shows the arguments";

    /// There is no control socket.
    NoListener("vmm.no-listener") {
        /// The descriptor.
        fd: i32,
        /// What is there instead.
        found: String,
    }
    text "descriptor {fd} is not a listening packet socket: {found}";
    remedy "monitors are started by straked, which hands them their socket";

    /// The jail could not be built.
    JailFailed("vmm.jail-failed") {
        /// What was being done.
        step: String,
    }
    text "the monitor cannot lock itself in: {step} failed";
    remedy "see the cause; `strake doctor` shows what this host lacks";

    /// The jail is weaker than it could be.
    JailReduced("vmm.jail-reduced") {
        /// What is missing.
        missing: String,
    }
    text "the monitor runs without {missing}";
    remedy "run straked as root, or enable what is missing (see the cause)";
}
