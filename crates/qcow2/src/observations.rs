//! What this crate observes.

strake_observe::catalog! {
    /// Every kind of observation of this crate.
    pub static CATALOG;

    /// A file that should be qcow2 is none.
    NotQcow2("qcow2.not-qcow2") {
        /// The path.
        path: String,
        /// What is wrong.
        why: String,
    }
    text "{path} is said to be a qcow2 image but is none: {why}";
    remedy "name the format that it has (`qemu-img info {path}` shows a guess), or restore the file";

    /// An image uses something that is not supported.
    Unsupported("qcow2.unsupported") {
        /// The path.
        path: String,
        /// What it uses.
        feature: String,
    }
    text "{path} uses {feature}, which is not supported";
    remedy "convert it: qemu-img convert -O qcow2 {path} NEW";

    /// An image contradicts itself.
    Damaged("qcow2.damaged") {
        /// The path.
        path: String,
        /// How.
        what: String,
    }
    text "{path} is damaged: {what}";
    remedy "run `qemu-img check {path}`; restore the image from a backup if that cannot repair it";

    /// An image must be repaired before it may be written.
    NeedsRepair("qcow2.needs-repair") {
        /// The path.
        path: String,
        /// Why.
        why: String,
    }
    text "{path} may not be written: {why}";
    remedy "repair it while it is not in use: qemu-img check -r all {path}";

    /// A chain of images leads back to itself.
    ChainLoop("qcow2.chain-loop") {
        /// The path that comes twice.
        path: String,
    }
    text "{path} is its own ancestor in a chain of backing files";
    remedy "find the image whose backing file is wrong (`qemu-img info`) and set the right one: qemu-img rebase -u";

    /// An image's backing file cannot be opened.
    BackingMissing("qcow2.backing-missing") {
        /// The image.
        path: String,
        /// The backing file that it names.
        backing: String,
    }
    text "{path} needs its backing file {backing}, which cannot be opened";
    remedy "bring the file back to where it was, or name its new place: qemu-img rebase -u -b NEW -F FORMAT {path}";

    /// A chain has more layers than allowed.
    ChainTooLong("qcow2.chain-too-long") {
        /// The path of the first.
        path: String,
        /// How many are allowed.
        most: u64,
    }
    text "{path} has more than {most} layers";
    remedy "consolidate its snapshots";

    /// An image does not say which format its backing file has.
    FormatNotNamed("qcow2.format-not-named") {
        /// The image.
        path: String,
        /// The backing file.
        backing: String,
    }
    text "{path} does not name the format of its backing file {backing}; guessing it from the content would let a guest choose files to read";
    remedy "name it: qemu-img rebase -u -b {backing} -F raw|qcow2 {path}";

    /// A format that is not known.
    UnknownFormat("qcow2.unknown-format") {
        /// The image that names it.
        path: String,
        /// The format.
        format: String,
    }
    text "{path} names the format '{format}', which is not known";
    remedy "use raw or qcow2";

    /// The name of a backing file is not a path.
    NotAPath("qcow2.backing-not-a-path") {
        /// The image.
        path: String,
        /// What it names.
        backing: String,
    }
    text "{path} names the backing file '{backing}', which is not a plain path";
    remedy "copy the backing file to a datastore and name it by its path";

    /// A backing file is where images may not be.
    OutsideOfStores("qcow2.outside-of-datastores") {
        /// The image.
        path: String,
        /// The file.
        backing: String,
    }
    text "{path} names {backing}, which is in no datastore of this host";
    remedy "move the file into a datastore, or add its folder as one";

    /// What was opened is not what was listed.
    ChainChanged("qcow2.chain-changed") {
        /// The path.
        path: String,
        /// What is different.
        why: String,
    }
    text "the chain of {path} is not as it was listed: {why}";
    remedy "find out what else changes these images, then try again";

    /// An image cannot grow any further.
    Full("qcow2.full") {
        /// The path.
        path: String,
        /// Why.
        why: String,
    }
    text "{path} cannot take more data: {why}";
    remedy "extend what it is stored on, or migrate the disk to another datastore";

    /// An image cannot be made or changed as asked.
    BadOption("qcow2.bad-option") {
        /// The path.
        path: String,
        /// Why not.
        why: String,
    }
    text "{path} cannot be made so: {why}";
    remedy "choose other values";

    /// The header has no room for a change.
    HeaderFull("qcow2.header-full") {
        /// The path.
        path: String,
    }
    text "the header of {path} has no room to change its backing file safely";
    remedy "use a shorter path, or convert the image: qemu-img convert -O qcow2 {path} NEW";

    /// A commit into a parent stopped.
    CommitFailed("qcow2.commit-failed") {
        /// The child.
        child: String,
        /// The parent.
        parent: String,
        /// Where it stopped, in bytes.
        at: u64,
    }
    text "committing {child} into {parent} stopped at offset {at}; {child} is whole and still needed";
    remedy "do what the cause below asks for, then go on";

    /// Streaming into a child stopped.
    StreamFailed("qcow2.stream-failed") {
        /// The child.
        child: String,
        /// Where it stopped, in bytes.
        at: u64,
    }
    text "copying what is below {child} into it stopped at offset {at}; its backing file is still needed";
    remedy "do what the cause below asks for, then go on";

    /// A layer was opened again, and reads of the old one do not end.
    LayerInUse("qcow2.layer-in-use") {
        /// The path of the disk.
        path: String,
    }
    text "reads of {path} that began long ago have not ended";
    remedy "look at the device below (`dmesg`); try again when it answers";
}
