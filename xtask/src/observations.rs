//! What the project's own commands observe when they fail.

strake_observe::catalog! {
    /// The observations of this crate.
    pub static CATALOG;

    /// A program that we ran ended badly.
    ToolFailed("xtask.tool-failed") {
        /// The command line.
        command: String,
        /// How it ended.
        status: String,
        /// The last lines that it printed.
        tail: String,
    }
    text "`{command}` ended with {status}: {tail}";
    remedy "run that command by hand to see all that it says";

    /// A program that we need is not installed and we may not install it.
    ToolsMissing("xtask.tools-missing") {
        /// The missing programs.
        tools: String,
        /// Their Debian packages.
        packages: String,
    }
    text "these programs are not installed: {tools}";
    remedy "as root: apt-get install --no-install-recommends {packages}";

    /// A Debian package did not come.
    PackageNotFetched("xtask.package-not-fetched") {
        /// Its name.
        package: String,
    }
    text "the Debian package '{package}' could not be downloaded";
    remedy "check /etc/apt/sources.list and the network, then run `apt-get update` as root";

    /// A package does not hold what we take from it.
    PackageUnexpected("xtask.package-unexpected") {
        /// Its name.
        package: String,
        /// What was looked for.
        wanted: String,
    }
    text "the Debian package '{package}' holds no {wanted}";
    remedy "the distribution may have moved it; remove target/lab/pkg and try again, or report it";

    /// A kernel module that the lab needs does not exist.
    ModuleMissing("xtask.module-missing") {
        /// Its name.
        module: String,
        /// The kernel's version.
        kernel: String,
    }
    text "kernel {kernel} has no module '{module}'";
    remedy "use Debian's cloud kernel (remove target/lab/pkg to fetch it anew)";

    /// A file to bring into the lab cannot be brought.
    BadFile("xtask.bad-file") {
        /// What was given.
        given: String,
        /// What is wrong with it.
        reason: String,
    }
    text "--file {given}: {reason}";
    remedy "write --file HOST:LAB with an existing host file and an absolute path in the lab";

    /// The lab machine itself gave no sign of life.
    LabStalled("xtask.lab-stalled") {
        /// What it was doing.
        stage: String,
        /// How long it has been silent, in seconds.
        silent_s: u64,
        /// The last lines of its console.
        console: String,
    }
    text "the lab stalled ({stage}, silent for {silent_s} s); its console ended with:\n{console}";
    remedy "run it again; the console is kept under target/lab/last";

    /// The lab ran out of its time.
    LabTimedOut("xtask.lab-timed-out") {
        /// The limit, in seconds.
        limit_s: u64,
        /// What it was doing.
        stage: String,
        /// The last lines of the command's output.
        output: String,
    }
    text "the lab command did not end within {limit_s} s ({stage}); its output ended with:\n{output}";
    remedy "look at target/lab/last for the whole console and output, or raise --timeout";

    /// A command on this machine ran out of its time.
    DirectTimedOut("xtask.timed-out") {
        /// The limit, in seconds.
        limit_s: u64,
    }
    text "the command did not end within {limit_s} s";
    remedy "its output stands above; look what it was at, or raise --timeout";

    /// Checks failed.
    ChecksFailed("xtask.checks-failed") {
        /// How many.
        failed: u64,
        /// Their names.
        names: String,
    }
    text "{failed} failed: {names}";
    remedy "their output stands above; `cargo xtask test --only` repeats one kind alone";

    /// A demonstration did not show what it is for.
    DemoFailed("xtask.demo-failed") {
        /// How the part that ran in the lab ended.
        status: String,
    }
    text "the demo did not end well ({status})";
    remedy "the observation tree stands above; the lab's console is kept under target/lab/last";
}
