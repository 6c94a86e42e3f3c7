//! The commands, one file each. To add one: its file, its `mod`, and one line in the table.

mod completion;
mod console;
mod create;
mod datastore;
mod disk;
mod doctor;
mod export;
mod jobs;
mod label;
mod limits;
mod logs;
mod man;
mod observations;
mod profile;
mod ps;
mod restart;
mod rm;
mod run;
mod set;
mod show;
mod snapshots;
mod start;
mod stop;
mod upgrade;

use clap::Subcommand;
use strake_observe::Result;

use crate::context::Context;
use crate::exit::Exit;
use crate::observations::Interrupted;
use crate::signals::Interrupts;

/// What happens at Ctrl-C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CtrlC {
    /// The command has its own answer.
    Own,
    /// Nothing is in the daemon's hands: the signal ends the process.
    Plain,
    /// The request may already be in the daemon's hands: say so.
    Said,
}

macro_rules! commands {
    ($( $variant:ident($module:ident, $ctrl_c:ident) ),* $(,)?) => {
        /// The commands.
        #[derive(Debug, Subcommand)]
        pub enum Command {
            $(
                #[allow(missing_docs, reason = "the documentation is that of the arguments")]
                $variant($module::Args),
            )*
        }

        async fn dispatch(command: Command, context: &Context) -> Result<Exit> {
            match command {
                $( Command::$variant(args) => $module::run(args, context).await, )*
            }
        }

        fn ctrl_c(command: &Command) -> CtrlC {
            match command {
                $( Command::$variant(_) => CtrlC::$ctrl_c, )*
            }
        }
    };
}

// In the order of the help.
commands! {
    Doctor(doctor, Plain),
    Create(create, Said),
    Run(run, Own),
    Start(start, Said),
    Stop(stop, Said),
    Restart(restart, Said),
    Upgrade(upgrade, Said),
    Rm(rm, Said),
    Ps(ps, Plain),
    Show(show, Plain),
    Set(set, Said),
    Label(label, Said),
    Profile(profile, Said),
    Console(console, Own),
    Logs(logs, Own),
    Datastore(datastore, Said),
    Disk(disk, Own),
    Export(export, Said),
    Jobs(jobs, Own),
    Observations(observations, Plain),
    Completion(completion, Plain),
    Man(man, Plain),
}

/// Runs a command.
pub(crate) async fn run(command: Command, context: &Context) -> Result<Exit> {
    if ctrl_c(&command) != CtrlC::Said {
        return dispatch(command, context).await;
    }
    let mut interrupts = Interrupts::new()?;
    tokio::select! {
        done = dispatch(command, context) => done,
        () = interrupts.next() => Err(Interrupted {
            remains: "the daemon may already be doing what it was asked for".to_owned(),
            advice: "see with `strake ps` what came of it".to_owned(),
        }
        .into()),
    }
}
