//! What this crate observes.

strake_observe::catalog! {
    /// What can be wrong with correspondences.
    pub static CATALOG;

    /// There are more disks than a word can name.
    TooManyDisks("correspond.too-many-disks") {
        /// How many there may be.
        most: u32,
    }
    text "correspondences are kept for {most} disks at most";
    remedy "this disk works as any other; its data is not shared with memory";
}
