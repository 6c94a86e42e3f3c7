//! What the command line sees.

strake_observe::catalog! {
    /// The observations of this crate.
    pub static CATALOG;

    /// Nothing answers on the daemon's socket.
    DaemonUnreachable("cli.daemon-unreachable") {
        /// The socket.
        socket: String,
    }
    text "the daemon cannot be reached at {socket}";
    remedy "start it (`straked`), or name its socket with --socket or STRAKE_SOCKET";

    /// The daemon took a request and did not answer in time.
    DaemonSilent("cli.daemon-silent") {
        /// The socket.
        socket: String,
        /// The request.
        request: String,
        /// How long it was waited for.
        seconds: u64,
    }
    text "the daemon at {socket} did not answer {request} within {seconds} s";
    remedy "look at the daemon's log; if it hangs, restart it: VMs keep running";

    /// The connection to the daemon broke in the middle of a request.
    ConnectionLost("cli.connection-lost") {
        /// The socket.
        socket: String,
        /// The request.
        request: String,
    }
    text "the connection to the daemon at {socket} broke during {request}";
    remedy "see with `strake ps` or `strake jobs ls` whether it was done; the daemon's log says why it ended";

    /// The daemon went away while a job was watched, and did not come back.
    DaemonGone("cli.daemon-gone") {
        /// The job.
        job: String,
        /// How long it was waited for.
        seconds: u64,
    }
    text "the daemon went away and did not come back within {seconds} s; job {job} goes on in the VM's monitor";
    remedy "start the daemon, then watch the job with `strake jobs wait {job}` or end it with `strake jobs cancel {job}`";

    /// What came back is not what the API says.
    AnswerNotUnderstood("cli.answer-not-understood") {
        /// The request.
        request: String,
        /// The HTTP status.
        status: u16,
        /// What is wrong with it.
        reason: String,
    }
    text "the answer to {request} (status {status}) is not understood: {reason}";
    remedy "compare the versions of `strake` and `straked` with `strake doctor`, and use the same";

    /// A spec file cannot be read.
    SpecUnreadable("cli.spec-unreadable") {
        /// The file.
        file: String,
    }
    text "the spec {file} cannot be read";
    remedy "name an existing TOML file with -f, or `-` for standard input";

    /// A profile's file cannot be read.
    ProfileFileUnreadable("cli.profile-file-unreadable") {
        /// The file.
        file: String,
    }
    text "the profile {file} cannot be read";
    remedy "name an existing TOML file, or `-` for standard input";

    /// The image that `run` was given does not exist.
    ImageMissing("cli.image-missing") {
        /// What was given.
        image: String,
    }
    text "there is no disk image {image}";
    remedy "give the path of a raw image or block device, or DATASTORE:FILE";

    /// A migration failed.
    MigrationFailed("cli.migration-failed") {
        /// The VM.
        vm: String,
        /// The disk.
        disk: String,
        /// The job.
        job: String,
        /// Where the disk still is.
        source: String,
    }
    text "disk {disk} of {vm} was not moved (job {job}): it stays, whole, on {source}";
    remedy "follow the remedy of the cause, then migrate it again";

    /// A migration was cancelled.
    MigrationCancelled("cli.migration-cancelled") {
        /// The VM.
        vm: String,
        /// The disk.
        disk: String,
        /// The job.
        job: String,
        /// Where the disk still is.
        source: String,
    }
    text "the migration of disk {disk} of {vm} (job {job}) was cancelled: it stays on {source}";
    remedy "migrate it again when it suits";

    /// A VM ended before a migration of its disk.
    MigrationInterrupted("cli.migration-interrupted") {
        /// The VM.
        vm: String,
        /// The disk.
        disk: String,
        /// The job.
        job: String,
    }
    text "the migration of disk {disk} of {vm} (job {job}) is interrupted: the VM ended before it";
    remedy "start the VM, which takes it up again, and wait for the job once more; or cancel it";

    /// A VM ended by a failure while its console was open.
    VmFailed("cli.vm-failed") {
        /// The VM.
        vm: String,
    }
    text "{vm} ended by a failure";
    remedy "see `strake logs {vm}`, then start it again with `strake start {vm}`";

    /// A VM's console cannot be attached again after the connection was lost.
    ConsoleLost("cli.console-lost") {
        /// The VM.
        vm: String,
        /// How long it was tried.
        seconds: u64,
    }
    text "the console of {vm} was lost and could not be attached again within {seconds} s";
    remedy "see what the VM does with `strake show {vm}`, then `strake console {vm}`";

    /// An upgrade met a VM that could not be restarted.
    UpgradeStopped("cli.upgrade-stopped") {
        /// The VM.
        vm: String,
        /// How many were restarted before.
        done: usize,
        /// How many were not begun.
        left: usize,
    }
    text "the upgrade stopped at {vm}: {done} VMs run in monitors of the installed version, {left} were not begun";
    remedy "mend the cause, then run `strake upgrade` again: VMs that were restarted are restarted once more, which harms nothing";

    /// Ctrl-C.
    Interrupted("cli.interrupted") {
        /// What goes on in spite of it.
        remains: String,
        /// How to go on.
        advice: String,
    }
    text "interrupted: {remains}";
    remedy "{advice}";

    /// Whoever read the output closed it.
    OutputClosed("cli.output-closed") {}
    text "whoever read the output closed it";
    remedy "none is needed";

    /// An address for NBD clients makes no sense.
    AddressUnusable("cli.address-unusable") {
        /// Why not.
        reason: String,
    }
    text "nobody can be served there: {reason}";
    remedy "give the path of a socket, or a host's name and a port as HOST:PORT";

    /// There is no such command to show the manual of.
    NoSuchCommand("cli.no-such-command") {
        /// What was asked for.
        command: String,
    }
    text "there is no command '{command}'";
    remedy "see `strake --help` for the commands";
}
