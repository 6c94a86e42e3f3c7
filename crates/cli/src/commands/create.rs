//! `strake create`

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use strake_api::rest::CreateVm;
use strake_api::spec::VmSpec;
use strake_observe::{Because, OsContext, Result};

use crate::context::Context;
use crate::exit::Exit;
use crate::observations::SpecUnreadable;

/// The largest spec that is read: one of a real VM is a thousandth of it.
const MAX_SPEC: u64 = 1 << 20;

/// Create a VM from a spec; it does not start yet
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  strake create web1 -f web1.toml

web1.toml:
  cpus = 2
  memory = \"1G\"
  [boot]
  from = \"disk\"
  [[disk]]
  name = \"root\"
  image = \"fast:web1-root.raw\"")]
pub struct Args {
    /// The new VM's name
    pub name: String,

    /// The spec, a TOML file; `-` reads standard input
    #[arg(short, long, value_name = "FILE")]
    pub file: PathBuf,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    let request = CreateVm {
        name: args.name,
        spec: read_spec(&args.file)?,
    };
    let vm = context.client.create(&request).await?;
    context.output.answer(&vm, |vm| {
        let name = &vm.name;
        format!("{name} created; start it with `strake start {name}`\n")
    })?;
    Ok(Exit::Done)
}

/// Reads and checks a spec. What is wrong with it is named with file, line and remedy.
pub(super) fn read_spec(file: &Path) -> Result<VmSpec> {
    let shown = if file == Path::new("-") {
        "standard input".to_owned()
    } else {
        file.display().to_string()
    };
    let mut text = String::new();
    let read = if file == Path::new("-") {
        io::stdin()
            .lock()
            .take(MAX_SPEC + 1)
            .read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(MAX_SPEC + 1).read_to_string(&mut text))
    };
    read.os("read", &shown).because_of(|| SpecUnreadable {
        file: shown.clone(),
    })?;
    VmSpec::from_toml(&text, &shown)
}
