//! What the host daemon sees.

strake_observe::catalog! {
    /// The daemon's observations.
    pub static CATALOG;

    // ---- The daemon itself ----

    /// The daemon could not begin.
    DaemonNotStarted("host.daemon-not-started") {
        /// Its state directory.
        state_dir: String,
    }
    text "straked cannot start on {state_dir}";
    remedy "mend the cause, then start it again";

    /// Another daemon has the directory.
    AlreadyRunning("host.already-running") {
        /// The directory.
        directory: String,
        /// What the lock file says about its holder.
        holder: String,
    }
    text "another straked ({holder}) already uses {directory}";
    remedy "use that one, stop it first, or choose other directories with --state-dir and --run-dir";

    /// The inventory could not be read or written.
    InventoryFailed("host.inventory-failed") {
        /// The database file.
        path: String,
        /// What was being done.
        doing: String,
        /// SQLite's words.
        reason: String,
        /// Whether it is certain that nothing of it was written.
        undone: bool,
    }
    text "inventory {path}: cannot {doing}: {reason}";
    remedy "check that the file system of {path} is healthy, writable and not full";

    /// The inventory was written by a newer daemon.
    InventoryTooNew("host.inventory-too-new") {
        /// The database file.
        path: String,
        /// Its schema version.
        found: i64,
        /// What this daemon knows.
        known: i64,
    }
    text "inventory {path} has schema {found}; this daemon knows schemas up to {known}";
    remedy "run the newer straked that wrote it";

    /// A record does not hold what it should.
    InventoryCorrupt("host.inventory-corrupt") {
        /// Which record.
        record: String,
        /// What is wrong.
        reason: String,
    }
    text "the inventory's record of {record} cannot be read: {reason}";
    remedy "restore the inventory from a backup, or report this as a defect of Strake";

    /// A request could not be understood.
    RequestRefused("host.request-refused") {
        /// What is wrong.
        reason: String,
        /// What to send instead.
        advice: String,
    }
    text "the request cannot be served: {reason}";
    remedy "{advice}";

    /// The daemon itself failed.
    Internal("host.internal") {
        /// What failed.
        what: String,
    }
    text "the daemon failed: {what}";
    remedy "report this as a defect of Strake, with the daemon's log";

    // ---- Names ----

    /// A name breaks the rule.
    BadName("host.bad-name") {
        /// What it would name.
        what: String,
        /// The name.
        name: String,
        /// Why.
        reason: String,
    }
    text "'{name}' cannot name a {what}: {reason}";
    remedy "choose a name of letters, digits, '-', '_' and '.', for example 'web1'";

    /// No such VM.
    NoSuchVm("host.no-such-vm") {
        /// Its name.
        vm: String,
    }
    text "there is no VM '{vm}'";
    remedy "`strake ps` lists the VMs";

    /// The name is taken.
    VmExists("host.vm-exists") {
        /// Its name.
        vm: String,
    }
    text "there is already a VM '{vm}'";
    remedy "choose another name, or remove it first with `strake rm {vm}`";

    /// A name belongs to an export where a VM's is wanted.
    NotAVm("host.not-a-vm") {
        /// The name.
        name: String,
    }
    text "'{name}' is an export, not a VM";
    remedy "`strake export ls` shows the exports; `strake disk migrate` and `strake jobs` work on both";

    /// A name belongs to a VM where an export's is wanted, or to nobody.
    NoSuchExport("host.no-such-export") {
        /// The name.
        export: String,
    }
    text "there is no export '{export}'";
    remedy "`strake export ls` lists the exports";

    /// A disk is exported.
    DiskExported("host.disk-exported") {
        /// The VM.
        vm: String,
        /// The disk.
        disk: String,
        /// The export.
        export: String,
    }
    text "disk '{disk}' of VM '{vm}' is exported as '{export}'";
    remedy "end the export first with `strake export rm {export}`";

    /// An export could not be made.
    ExportFailed("host.export-failed") {
        /// Its name.
        export: String,
    }
    text "export '{export}' was not made";
    remedy "see the cause below";

    /// An export could not be ended.
    ExportNotRemoved("host.export-not-removed") {
        /// Its name.
        export: String,
    }
    text "export '{export}' was not removed";
    remedy "see the cause below, then try again";

    /// A socket for clients cannot be had.
    ListenRefused("host.listen-refused") {
        /// The address.
        address: String,
        /// Why not.
        reason: String,
    }
    text "clients cannot be served at {address}: {reason}";
    remedy "choose another address, or free this one";

    /// No such disk.
    NoSuchDisk("host.no-such-disk") {
        /// The VM.
        vm: String,
        /// The disk.
        disk: String,
        /// Those it has.
        has: String,
    }
    text "VM '{vm}' has no disk '{disk}'";
    remedy "name one of its disks: {has}";

    /// No such datastore.
    NoSuchDatastore("host.no-such-datastore") {
        /// Its name.
        datastore: String,
    }
    text "there is no datastore '{datastore}'";
    remedy "`strake datastore ls` lists them; `strake datastore add {datastore} DIR` adds it";

    /// No such job.
    NoSuchJob("host.no-such-job") {
        /// Its name.
        job: String,
    }
    text "there is no job '{job}'";
    remedy "`strake jobs ls` lists the jobs; the oldest that have ended are forgotten";

    // ---- Profiles, values and labels ----

    /// No such profile.
    NoSuchProfile("host.no-such-profile") {
        /// Its name.
        profile: String,
    }
    text "there is no profile '{profile}'";
    remedy "`strake profile ls` lists them";

    /// A profile of the inventory cannot be read by this daemon.
    ProfileUnreadable("host.profile-unreadable") {
        /// Its name.
        profile: String,
    }
    text "profile '{profile}' of the inventory is not in force: this daemon cannot read it";
    remedy "mend its file as the cause says and apply it again, or run the straked that it was applied with";

    /// Profiles were not put in force.
    ProfilesRefused("host.profiles-refused") {
        /// Their files.
        files: String,
    }
    text "{files}: not applied; what was in force stays in force";
    remedy "mend the cause; `strake profile plan` tells beforehand what would change";

    /// A change would bring about conflicts.
    SteeringRefused("host.steering-refused") {
        /// How many.
        conflicts: usize,
    }
    text "nothing was changed: {conflicts} of what profiles say would be in conflict";
    remedy "mend each of the causes first";

    /// A profile gives values to VMs that run.
    ProfileInUse("host.profile-in-use") {
        /// Its name.
        profile: String,
        /// What would change.
        users: String,
    }
    text "profile '{profile}' was not removed: values of running VMs come from it: {users}";
    remedy "set these values at the VMs, or remove it all the same with `strake profile rm {profile} --force`";

    /// Profiles contradict each other about an object.
    EffectiveConflict("host.effective-conflict") {
        /// The object.
        object: String,
    }
    text "profiles contradict each other about {object}";
    remedy "mend the profiles that the causes name and apply them again";

    /// Values or labels were not changed.
    SetFailed("host.set-failed") {
        /// The object.
        object: String,
    }
    text "{object} was not changed";
    remedy "mend the cause, then try again";

    /// A value cannot be set.
    ValueRefused("host.value-refused") {
        /// What was to be set.
        target: String,
        /// Why not, as the end of a sentence.
        reason: String,
    }
    text "'{target}' {reason}";
    remedy "`strake profile fields` lists the fields and what they hold";

    /// An own value has no effect.
    ValueOverridden("host.value-overridden") {
        /// The object.
        object: String,
        /// The field.
        path: String,
        /// The value.
        value: String,
        /// The VM.
        vm: String,
    }
    text "'{path}' of {object}: the value {value} is set, but a locked rule holds against it";
    remedy "`strake profile effective {vm} --explain` tells which profile it is";

    // ---- Datastores and images ----

    /// The name or directory is taken.
    DatastoreExists("host.datastore-exists") {
        /// Its name.
        datastore: String,
        /// Its directory.
        path: String,
    }
    text "datastore '{datastore}' is already there, with the directory {path}";
    remedy "use it, or choose another name and directory";

    /// The directory cannot be a datastore.
    DatastoreRefused("host.datastore-refused") {
        /// The name.
        datastore: String,
        /// The directory.
        path: String,
        /// Why.
        reason: String,
    }
    text "{path} cannot be datastore '{datastore}': {reason}";
    remedy "name an existing directory that the daemon may write to, as an absolute path";

    /// Disks or jobs use it.
    DatastoreInUse("host.datastore-in-use") {
        /// Its name.
        datastore: String,
        /// Who uses it.
        users: String,
    }
    text "datastore '{datastore}' is used by {users}";
    remedy "migrate those disks to another datastore or remove their VMs first";

    /// The directory cannot be reached.
    DatastoreUnavailable("host.datastore-unavailable") {
        /// Its name.
        datastore: String,
        /// Its directory.
        path: String,
    }
    text "datastore '{datastore}' cannot be reached at {path}";
    remedy "mount or restore {path}, or choose another datastore";

    /// No room.
    DatastoreFull("host.datastore-full") {
        /// Its name.
        datastore: String,
        /// Bytes free.
        free: u64,
        /// Bytes that are needed.
        needed: u64,
        /// The same, for people.
        shortage: String,
    }
    text "datastore '{datastore}' is too full: {shortage}";
    remedy "free space on '{datastore}' or choose another datastore";

    /// An image cannot be used.
    ImageRefused("host.image-refused") {
        /// Its path.
        path: String,
        /// Why.
        reason: String,
        /// What to do.
        advice: String,
    }
    text "image {path} cannot be used: {reason}";
    remedy "{advice}";

    /// A chain of images cannot be used.
    ChainRefused("host.chain-refused") {
        /// The path of its first image.
        path: String,
    }
    text "image {path} cannot be used with what is below it";
    remedy "do what the cause asks for";

    /// Something is done that only files can have done to them.
    NotAFile("host.not-a-file") {
        /// The location.
        location: String,
    }
    text "{location} is not a file of this host";
    remedy "do this with a disk that is a file or a block device";

    /// A monitor would need more files than it can be given.
    TooManyFiles("host.too-many-files") {
        /// How many it can be given.
        most: usize,
    }
    text "the VM's devices and the layers of its disks' images are more than the {most} files that a monitor can be given";
    remedy "consolidate its snapshots, or migrate disks that have many layers: that makes one layer of them";

    /// A disk has no such snapshot.
    NoSuchSnapshot("host.no-such-snapshot") {
        /// The disk.
        disk: String,
        /// The name.
        snapshot: String,
        /// Those that it has.
        has: String,
    }
    text "disk '{disk}' has no snapshot '{snapshot}' (it has: {has})";
    remedy "see them with `strake disk tree`";

    /// A disk has a snapshot of that name.
    SnapshotExists("host.snapshot-exists") {
        /// The disk.
        disk: String,
        /// The name.
        snapshot: String,
    }
    text "disk '{disk}' has a snapshot '{snapshot}' already";
    remedy "choose another name, or delete that one with `strake disk delete-snapshot`";

    /// Work on a disk's snapshots was refused.
    SnapshotRefused("host.snapshot-refused") {
        /// What was asked for.
        doing: String,
        /// The VM.
        vm: String,
        /// The disk.
        disk: String,
    }
    text "cannot {doing} disk '{disk}' of VM '{vm}'";
    remedy "mend the cause, then try again; the disk is as it was";

    /// A disk cannot have a snapshot.
    NoSnapshots("host.no-snapshots") {
        /// The disk.
        disk: String,
        /// Why.
        reason: String,
        /// What to do.
        advice: String,
    }
    text "disk '{disk}' cannot have another snapshot: {reason}";
    remedy "{advice}";

    /// A job on a disk's layers ended with the disk as it was.
    LayerJobFailed("host.layer-job-failed") {
        /// The job.
        job: String,
        /// What it was to do.
        kind: String,
        /// The VM.
        vm: String,
        /// The disk.
        disk: String,
        /// Where it stays.
        source: String,
    }
    text "job {job} ({kind}) failed: disk '{disk}' of VM '{vm}' stays on {source}";
    remedy "mend the cause, then try again";

    /// An image is locked.
    ImageInUse("host.image-in-use") {
        /// Its path.
        path: String,
        /// By whom.
        user: String,
    }
    text "image {path} is in use by {user}";
    remedy "stop what uses {path}, or give this VM an image of its own";

    /// An image could not be made.
    ImageNotCreated("host.image-not-created") {
        /// Its path.
        path: String,
        /// Its size.
        size: u64,
    }
    text "image {path} of {size} bytes could not be created";
    remedy "mend the cause, then try again; nothing of it was left behind";

    /// An image could not be opened.
    ImageNotOpened("host.image-not-opened") {
        /// Its path.
        path: String,
    }
    text "image {path} cannot be opened";
    remedy "check that it is there and that the daemon may open it";

    /// A file that should have gone is still there.
    NotRemoved("host.not-removed") {
        /// Its path.
        path: String,
        /// What it was.
        what: String,
    }
    text "{path} ({what}) is no longer needed but could not be removed";
    remedy "remove it by hand";

    // ---- VMs ----

    /// A VM could not be created.
    CreateFailed("host.create-failed") {
        /// Its name.
        vm: String,
    }
    text "VM '{vm}' was not created";
    remedy "mend the cause, then create it again; nothing of it was left behind";

    /// A VM could not be started.
    StartFailed("host.start-failed") {
        /// Its name.
        vm: String,
    }
    text "VM '{vm}' was not started";
    remedy "mend the cause, then `strake start {vm}`";

    /// A VM could not be stopped.
    StopFailed("host.stop-failed") {
        /// Its name.
        vm: String,
    }
    text "VM '{vm}' was not stopped";
    remedy "mend the cause, or `strake stop {vm} --force`";

    /// A VM could not be removed.
    RemoveFailed("host.remove-failed") {
        /// Its name.
        vm: String,
    }
    text "VM '{vm}' was not removed entirely";
    remedy "mend the cause, then try again";

    /// The VM is in the wrong state.
    WrongState("host.wrong-state") {
        /// Its name.
        vm: String,
        /// What it does.
        state: String,
        /// What it would have to do.
        needed: String,
        /// How it gets there.
        advice: String,
    }
    text "VM '{vm}' is {state}, not {needed}";
    remedy "{advice}";

    /// A guest stays in its monitor.
    HandoverFailed("host.handover-failed") {
        /// The VM.
        vm: String,
    }
    text "VM '{vm}' could not be restarted fast; its guest goes on as before";
    remedy "mend the cause and try again, or restart the VM without --fast, which reboots its guest";

    /// A fast restart while a job works on the VM.
    HandoverMeetsJobs("host.handover-meets-jobs") {
        /// The VM.
        vm: String,
        /// The jobs.
        jobs: Vec<String>,
    }
    text "VM '{vm}' cannot be restarted fast while jobs work on its disks: {jobs:?}";
    remedy "wait for them (`strake jobs`) or cancel them, then try again";

    /// A monitor did not lend what its successor needs.
    NotLent("host.not-lent") {
        /// The VM.
        vm: String,
        /// What is missing.
        what: String,
    }
    text "the monitor of VM '{vm}' did not give {what}";
    remedy "restart the VM without --fast";

    /// Nobody knows in which of its two monitors a guest is.
    TakeOverUnclear("host.take-over-unclear") {
        /// The VM.
        vm: String,
        /// The new monitor.
        pid: u32,
    }
    text "the new monitor of VM '{vm}' (pid {pid}) has its guest and does not say whether it runs";
    remedy "look at the monitor's log; `strake show` tells once it answers";

    /// The guest did not react to the power button.
    StopTimedOut("host.stop-timed-out") {
        /// The VM.
        vm: String,
        /// How long was waited.
        seconds: u64,
    }
    text "the guest of VM '{vm}' did not shut down within {seconds} s; it keeps running";
    remedy "wait longer with --timeout, shut it down from inside, or `strake stop {vm} --force`";

    /// The host has no usable KVM.
    KvmUnavailable("host.kvm-unavailable") {
        /// The device.
        path: String,
        /// What to do about it.
        advice: String,
    }
    text "the host's virtualisation ({path}) cannot be used";
    remedy "{advice}";

    /// A boot file cannot be used.
    BootFileRefused("host.boot-file-refused") {
        /// What it is: `kernel` or `initrd`.
        what: String,
        /// Its path.
        path: String,
    }
    text "the {what} {path} cannot be opened";
    remedy "name an existing file in the spec's [boot] section";

    /// A tap device could not be had.
    TapUnavailable("host.tap-unavailable") {
        /// The tap.
        tap: String,
        /// What to do.
        advice: String,
    }
    text "tap device '{tap}' cannot be used";
    remedy "{advice}";

    /// A tap or a MAC address belongs to another VM.
    NicConflict("host.nic-conflict") {
        /// What: `tap` or `MAC address`.
        what: String,
        /// Its value.
        value: String,
        /// Whose it is.
        vm: String,
    }
    text "the {what} {value} belongs to VM '{vm}'";
    remedy "choose another one, or leave it out to have one made";

    // ---- Monitors ----

    /// The monitor's program could not be run.
    MonitorNotSpawned("host.monitor-not-spawned") {
        /// The program.
        program: String,
    }
    text "the monitor {program} cannot be run";
    remedy "install strake-vmm beside straked, or name it with --vmm or STRAKE_VMM";

    /// The monitor speaks another version of the protocol.
    MonitorMismatch("host.monitor-mismatch") {
        /// What it said.
        said: String,
        /// What was expected.
        expected: String,
    }
    text "the monitor is {said}, not {expected}";
    remedy "install straked and strake-vmm of the same version";

    /// The monitor did not answer in time.
    MonitorSilent("host.monitor-silent") {
        /// What was asked.
        request: String,
        /// How long was waited.
        seconds: u64,
    }
    text "the monitor did not answer '{request}' within {seconds} s";
    remedy "look at the monitor's log; if it hangs, `strake stop --force`";

    /// The connection to the monitor ended.
    MonitorLost("host.monitor-lost") {
        /// What was asked.
        request: String,
    }
    text "the connection to the monitor ended during '{request}'";
    remedy "look at the VM's state and at the monitor's log";

    /// The monitor refused.
    MonitorRefused("host.monitor-refused") {
        /// What was asked.
        request: String,
    }
    text "the monitor refused '{request}'";
    remedy "mend the cause, then try again";

    /// What came over the control socket is not the protocol.
    MonitorGarbled("host.monitor-garbled") {
        /// What is wrong.
        reason: String,
    }
    text "the monitor's control socket gave something that is not a packet: {reason}";
    remedy "install straked and strake-vmm of the same version";

    /// The monitor is gone though nobody asked it.
    MonitorDied("host.monitor-died") {
        /// The VM.
        vm: String,
        /// Its process.
        pid: u32,
        /// How it ended.
        how: String,
    }
    text "the monitor of VM '{vm}' (pid {pid}) ended unexpectedly: {how}";
    remedy "the disks are intact: `strake start {vm}`; report the cause if it is not the host's";

    /// The monitor did what its jail forbids.
    MonitorBrokeOut("host.monitor-broke-out") {
        /// The VM.
        vm: String,
        /// Its log.
        log: String,
    }
    text "the monitor of VM '{vm}' made a system call that its jail forbids (SIGSYS), and was ended for that";
    remedy "the host is safe; report this as a defect of Strake with {log}: either the monitor needs that call, or its guest has taken it over";

    /// Whether a monitor runs its guest is not known.
    StartUnclear("host.start-unclear") {
        /// The VM.
        vm: String,
        /// Its process.
        pid: u32,
    }
    text "the monitor of VM '{vm}' (pid {pid}) was told to start its guest and does not say whether it did";
    remedy "straked keeps asking it, and `strake ps` shows what it learns; `strake stop {vm} --force` ends it";

    /// The last lines of a monitor's log.
    MonitorSaid("host.monitor-said") {
        /// The log file.
        path: String,
        /// The lines, joined.
        lines: String,
    }
    text "the last lines of {path}: {lines}";
    remedy "read them as the monitor's own account";

    /// A monitor lives but cannot be reached.
    MonitorUnreachable("host.monitor-unreachable") {
        /// The VM.
        vm: String,
        /// Its process.
        pid: u32,
    }
    text "the monitor of VM '{vm}' (pid {pid}) lives but its control socket does not answer";
    remedy "straked keeps trying; shut the guest down from inside, or `strake stop {vm} --force`";

    /// A monitor was ended by force.
    MonitorKilled("host.monitor-killed") {
        /// The VM.
        vm: String,
        /// Its process.
        pid: u32,
        /// Why.
        reason: String,
    }
    text "the monitor of VM '{vm}' (pid {pid}) was ended by force: {reason}";
    remedy "nothing to do; what the guest had flushed is on its disks";

    // ---- Migration ----

    /// A migration was refused before a byte was copied.
    MigrationRefused("host.migration-refused") {
        /// The VM.
        vm: String,
        /// The disk.
        disk: String,
        /// The destination datastore.
        to: String,
    }
    text "disk '{disk}' of VM '{vm}' does not move to '{to}'; nothing was copied";
    remedy "mend the cause, then try again";

    /// It is there already.
    SameDatastore("host.same-datastore") {
        /// The disk.
        disk: String,
        /// The datastore.
        datastore: String,
    }
    text "disk '{disk}' is already on datastore '{datastore}'";
    remedy "choose another datastore";

    /// The destination file exists.
    DestinationExists("host.destination-exists") {
        /// Its path.
        path: String,
        /// Who uses it, or that nobody known does.
        user: String,
    }
    text "{path} exists already ({user})";
    remedy "remove or rename that file if nothing needs it, or choose another datastore";

    /// The file system cannot hold a file of that size.
    DestinationTooSmall("host.destination-too-small") {
        /// The path.
        path: String,
        /// The disk's size.
        size: u64,
    }
    text "the file system of {path} cannot hold a file of {size} bytes";
    remedy "choose a datastore on another file system";

    /// Another job has the disk.
    DiskBusy("host.disk-busy") {
        /// The disk.
        disk: String,
        /// The job.
        job: String,
    }
    text "disk '{disk}' is being migrated by job {job}";
    remedy "wait for that job or cancel it";

    /// A migration ended with the disk on its source.
    MigrationFailed("host.migration-failed") {
        /// The job.
        job: String,
        /// The VM.
        vm: String,
        /// The disk.
        disk: String,
        /// Where it stays.
        source: String,
    }
    text "job {job}: disk '{disk}' of VM '{vm}' was not migrated and stays on {source}";
    remedy "mend the cause, then migrate again";

    /// The job's monitor ended under it.
    JobWithoutMonitor("host.job-without-monitor") {
        /// The job.
        job: String,
        /// Why.
        reason: String,
    }
    text "job {job} ended with its monitor: {reason}";
    remedy "start the VM and migrate again";

    /// An interrupted job was not taken up again.
    JobNotTakenUp("host.job-not-taken-up") {
        /// The job.
        job: String,
    }
    text "job {job} was interrupted and cannot be taken up again; its disk stays on its source";
    remedy "start the migration again: it begins from the start";

    /// The monitor does not know the job.
    JobForgotten("host.job-forgotten") {
        /// The job.
        job: String,
    }
    text "the monitor knows nothing of job {job}";
    remedy "migrate again";

    /// The job is over or beyond cancelling.
    JobNotActive("host.job-not-active") {
        /// The job.
        job: String,
        /// Its phase.
        phase: String,
    }
    text "job {job} cannot be cancelled: it is {phase}";
    remedy "look at the job's state";

    /// Binding and monitor disagree.
    BindingSplit("host.binding-split") {
        /// The job.
        job: String,
        /// The binding.
        bound: String,
        /// What the monitor says.
        said: String,
    }
    text "job {job}: the inventory binds the disk to {bound} but the monitor says {said}";
    remedy "the VM was stopped to keep its data whole: start it again; report this as a defect of Strake";

    /// The transaction failed.
    CommitFailed("host.commit-failed") {
        /// The job.
        job: String,
    }
    text "job {job}: the binding could not be changed";
    remedy "mend the inventory's file system; the disk stays on its source";
}
