//! What this crate observes.

strake_observe::catalog! {
    /// What goes wrong with a machine and its control.
    pub static CATALOG;

    /// The configuration describes a machine that cannot be.
    BadConfig("machine.bad-config") {
        /// The VM.
        vm: String,
        /// What is wrong.
        reason: String,
    }
    text "the machine of '{vm}' cannot be built as described: {reason}";
    remedy "correct the VM's spec";

    /// The machine could not be built.
    BuildFailed("machine.build-failed") {
        /// The VM.
        vm: String,
        /// What was being done.
        step: String,
    }
    text "cannot build the machine of '{vm}': {step} failed";
    remedy "see the cause";

    /// A message names a descriptor that did not come with it.
    DescriptorMissing("machine.descriptor-missing") {
        /// What the descriptor was for.
        purpose: String,
        /// Its place.
        index: u8,
        /// How many came.
        count: usize,
    }
    text "descriptor {index} for {purpose} did not come ({count} descriptors came) or was used twice";
    remedy "this is a fault of the daemon: report it with both versions";

    /// An image is not what it is to be used for.
    ImageMismatch("machine.image-mismatch") {
        /// Its path.
        path: String,
        /// What it is for.
        purpose: String,
        /// Why it does not fit.
        reason: String,
    }
    text "image {path} does not fit {purpose}: {reason}";
    remedy "this is a fault of the daemon: report it with both versions";

    /// A disk's image is read by somebody else as well.
    ImageShared("machine.image-shared") {
        /// Its path.
        path: String,
    }
    text "image {path} is written by the guest now, and another process still has it locked for reading";
    remedy "end what reads {path}: what it reads is not of one instant; the VM has the image for itself after its next start";

    /// A packet that is none of the protocol.
    BadPacket("machine.bad-packet") {
        /// What is wrong.
        reason: String,
    }
    text "a packet on the control socket cannot be understood: {reason}";
    remedy "use a daemon of the monitor's version; nothing was changed";

    /// The daemon speaks another version of the protocol.
    WrongVersion("machine.wrong-protocol-version") {
        /// The daemon's.
        theirs: u32,
        /// The monitor's.
        ours: u32,
    }
    text "the daemon speaks version {theirs} of the control protocol, this monitor version {ours}";
    remedy "restart the VM with a monitor of the daemon's version";

    /// The daemon did not say hello first.
    HelloMissing("machine.hello-missing") {
    }
    text "the first request of a connection must be the hello";
    remedy "this is a fault of the daemon: report it with both versions";

    /// The machine cannot do that now.
    WrongState("machine.wrong-state") {
        /// What was asked.
        asked: String,
        /// What the machine does.
        state: String,
    }
    text "cannot {asked}: the machine is {state}";
    remedy "look at the VM's state and ask for what it can do";

    /// There is no such disk.
    NoSuchDisk("machine.no-such-disk") {
        /// Its name.
        disk: String,
    }
    text "the VM has no disk '{disk}'";
    remedy "`strake show` lists its disks";

    /// There is no such job.
    NoSuchJob("machine.no-such-job") {
        /// Its name.
        job: String,
    }
    text "the monitor has no job '{job}'";
    remedy "the job ended with an earlier run of the VM; look at the daemon's list of jobs";

    /// A job of this name exists.
    JobExists("machine.job-exists") {
        /// Its name.
        job: String,
    }
    text "the monitor already has a job '{job}'";
    remedy "this is a fault of the daemon: report it with both versions";

    /// The vCPUs did not stop in time.
    PauseTimeout("machine.pause-timeout") {
        /// How many still run.
        running: usize,
        /// How long was waited, in milliseconds.
        waited_ms: u64,
    }
    text "{running} vCPUs did not stop within {waited_ms} ms";
    remedy "the host is overloaded or a device hangs; the VM goes on, try again";

    /// A guest cannot move while something works on its disks.
    JobsRun("machine.jobs-run") {
        /// The jobs.
        jobs: Vec<String>,
    }
    text "the guest cannot be handed to another monitor while jobs work on its disks: {jobs:?}";
    remedy "wait for the jobs to end or cancel them, then try again; the VM goes on";

    /// A guest was not handed over.
    NotHandedOver("machine.not-handed-over") {
        /// The VM.
        vm: String,
    }
    text "'{vm}' was not handed to another monitor and goes on in this one";
    remedy "see the cause";

    /// A guest was not taken over.
    NotTakenOver("machine.not-taken-over") {
        /// The VM.
        vm: String,
    }
    text "'{vm}' could not be taken over from the monitor that it runs in";
    remedy "see the cause; the VM goes on in the monitor that it was in";

    /// The way between two monitors does not work.
    RecordsLost("machine.records-lost") {
        /// What was being done.
        doing: String,
    }
    text "the records of a guest on its way to another monitor were lost: {doing}";
    remedy "the other monitor or the daemon has ended; the guest goes on where it was";

    /// A thread could not be started.
    ThreadFailed("machine.thread-failed") {
        /// Its name.
        thread: String,
    }
    text "thread '{thread}' could not be started";
    remedy "raise the monitor's limit of threads or memory";

    /// A part of the machine did not come to rest at the end.
    StopIncomplete("machine.stop-incomplete") {
        /// Which part.
        part: String,
    }
    text "'{part}' did not come to rest while the machine was stopped";
    remedy "writes that the guest had not flushed may be missing; see the cause";

    /// Nobody fetched observations for too long.
    ObservationsDropped("machine.observations-dropped") {
        /// How many are gone.
        count: u64,
    }
    text "{count} observations were dropped because no daemon fetched them";
    remedy "keep the daemon running; later observations are complete";

    /// A tree of causes was too large to be told as a whole.
    CausesCut("machine.causes-cut") {
        /// How many observations are not told.
        count: usize,
    }
    text "{count} more observations below this one were too many to be told";
    remedy "what is told names the failure; the monitor's log may have the rest";

    /// The control socket does not work.
    ControlFailed("machine.control-failed") {
        /// What was being done.
        step: String,
    }
    text "the control socket failed: {step}";
    remedy "restart the VM";

    /// The monitor found a fault of its own.
    Panicked("machine.panicked") {
        /// Which thread.
        thread: String,
        /// Where and what.
        message: String,
    }
    text "the monitor found a fault of its own in thread '{thread}' and ends: {message}";
    remedy "start the VM again and report this observation with the monitor's version";
}
