//! What is seen of records.

strake_observe::catalog! {
    /// The catalog of this crate.
    pub static CATALOG;

    /// The bytes are no set of records, or a record is none of its kind.
    Damaged("state.damaged") {
        /// Which record, or the set.
        record: String,
        /// What is wrong.
        reason: String,
    }
    text "the saved state is damaged: {record}: {reason}";
    remedy "nothing was taken over; the process that saved it goes on";

    /// A record was written by a newer version.
    TooNew("state.too-new") {
        /// The component.
        component: String,
        /// The record's kind.
        kind: String,
        /// Its version.
        version: u16,
        /// The newest version that is understood.
        known: u16,
    }
    text "'{component}' was saved as '{kind}' version {version}; this program reads up to version {known}";
    remedy "use a program that is at least as new as the one that saved it";

    /// A component found no record of its own.
    Missing("state.missing") {
        /// The component.
        component: String,
        /// The record's kind.
        kind: String,
    }
    text "the saved state has no record '{kind}' of '{component}'";
    remedy "the machine that was saved is another one; what the guest sees cannot change without a reboot";

    /// Nobody took a record.
    LeftOver("state.left-over") {
        /// The records, as `component/kind`.
        records: Vec<String>,
    }
    text "nobody takes these records of the saved state: {records:?}";
    remedy "the machine that was saved had more; what the guest sees cannot change without a reboot";

    /// A component is not what it was when it was saved.
    ShapeDiffers("state.shape-differs") {
        /// The component.
        component: String,
        /// What of it.
        what: String,
        /// What it was.
        saved: String,
        /// What it is.
        found: String,
    }
    text "'{component}' was saved with {what} {saved} and now has {found}";
    remedy "what the guest sees cannot change without a reboot: restart the VM without --fast";

    /// There is more to save than records hold.
    TooLarge("state.too-large") {
        /// The component.
        component: String,
        /// What is too large.
        what: String,
    }
    text "'{component}' cannot be saved: {what}";
    remedy "this is a fault of the monitor: report it";
}
