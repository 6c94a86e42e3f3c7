//! `strake run`

use std::path::{Path, PathBuf};

use strake_api::image::ImageFormat;
use strake_api::rest::{CreateVm, Vm};
use strake_api::spec::{BootSpec, Bytes, DiskSpec, NicSpec, VmSpec};
use strake_observe::{OsContext, Result, Task};

use super::console;
use super::create::read_spec;
use super::disk::Format;
use crate::attach::Backlog;
use crate::client::Disks;
use crate::context::Context;
use crate::exit::Exit;
use crate::observations::{ImageMissing, Interrupted};
use crate::signals::Interrupts;

/// The serial console that `run` opens.
const CONSOLE: &str = "console=ttyS0";

/// The longest name that is made from a file's name; a VM's name may be longer, and `-2` fits.
const MAX_MADE_NAME: usize = 48;

/// Create a VM, start it and open its console, in one line
#[derive(Debug, clap::Args)]
#[command(override_usage = "\
strake run [OPTIONS] IMAGE
       strake run [OPTIONS] --kernel FILE [IMAGE]
       strake run -f FILE [--name NAME] [--detach]")]
#[command(after_help = "\
Examples:
  strake run disk.qcow2 --cpus 2 --memory 1G
  strake run disk.raw --kernel vmlinuz --initrd initrd.img --append root=/dev/vda1
  strake run -f web1.toml --detach

Without --kernel the VM boots what its disk's own boot entries name. The VM stays after the
console is left (Ctrl-]): `strake stop NAME`, `strake rm NAME`.")]
pub struct Args {
    /// The disk: an image file, a block device, or DATASTORE:FILE
    #[arg(required_unless_present_any = ["file", "kernel"])]
    pub image: Option<String>,

    /// A spec instead of the options below; `-` reads standard input
    #[arg(
        short,
        long,
        value_name = "FILE",
        conflicts_with_all = ["image", "cpus", "memory", "kernel", "append", "tap", "bridge"]
    )]
    pub file: Option<PathBuf>,

    /// The image's format [default: qcow2 if its name ends in .qcow2, else raw]
    #[arg(long, value_enum, requires = "image")]
    pub format: Option<Format>,

    /// The VM's name [default: made from the file's name]
    #[arg(long)]
    pub name: Option<String>,

    /// How many vCPUs
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    pub cpus: u8,

    /// The guest's memory
    #[arg(long, default_value = "1G", value_name = "SIZE")]
    pub memory: Bytes,

    /// A kernel: bzImage or ELF
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// The initial RAM disk for --kernel
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,

    /// The kernel's command line, or what is appended to the disk's own
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,

    /// Give it a network interface on this tap device
    #[arg(long, value_name = "TAP")]
    pub tap: Option<String>,

    /// Give it a network interface on this bridge
    #[arg(long, value_name = "BRIDGE")]
    pub bridge: Option<String>,

    /// Do not open the console
    #[arg(short, long)]
    pub detach: bool,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    let mut interrupts = Interrupts::new()?;
    let vm = tokio::select! {
        vm = create_and_start(&args, context) => vm?,
        () = interrupts.next() => return Err(Interrupted {
            remains: "the VM may have been created and started".to_owned(),
            advice: "see with `strake ps`; `strake stop` and `strake rm` undo it".to_owned(),
        }
        .into()),
    };
    if args.detach {
        context.output.answer(&vm, super::start::started)?;
        return Ok(Exit::Done);
    }
    drop(interrupts);
    console::open(&vm.name, Backlog::All, context).await
}

async fn create_and_start(args: &Args, context: &Context) -> Result<Vm> {
    let (spec, from) = match &args.file {
        Some(file) => (read_spec(file)?, file.display().to_string()),
        None => spec(args)?,
    };
    let name = match &args.name {
        Some(name) => name.clone(),
        None => free_name(&from, &context.client.vms().await?),
    };
    let created = context.client.create(&CreateVm { name, spec }).await?;
    match context.client.start(&created.name).await {
        Ok(vm) => Ok(vm),
        // Nothing may stay behind, so that the same line can be tried again.
        Err(failure) => {
            let mut undo = Task::begin("remove the VM that did not start");
            let removed = context.client.remove(&created.name, Disks::Keep).await;
            if undo.attempt(removed).is_none() {
                context.output.remark(&format!(
                    "{} was created but did not start, and could not be removed again",
                    created.name
                ));
            }
            undo.succeed();
            Err(failure)
        }
    }
}

/// The spec that the options describe, and the file that gives the VM its name.
fn spec(args: &Args) -> Result<(VmSpec, String)> {
    let disks = match &args.image {
        None => Vec::new(),
        Some(image) => vec![DiskSpec {
            name: "root".to_owned(),
            image: image_name(image)?,
            format: args.format.map(ImageFormat::from),
            size: None,
            read_only: false,
            queues: None,
            iops: None,
            bandwidth: None,
        }],
    };
    let append = args.append.clone().unwrap_or_default();
    // The console that is about to be opened must show something.
    let cmdline = if append.contains("console=") {
        append
    } else {
        format!("{CONSOLE} {append}").trim_end().to_owned()
    };
    let boot = match &args.kernel {
        Some(kernel) => BootSpec::Kernel {
            kernel: absolute(kernel)?,
            initrd: args.initrd.as_deref().map(absolute).transpose()?,
            cmdline,
        },
        None => BootSpec::Disk {
            disk: None,
            cmdline,
        },
    };
    let nics = if args.tap.is_some() || args.bridge.is_some() {
        vec![NicSpec {
            name: "net0".to_owned(),
            tap: args.tap.clone(),
            bridge: args.bridge.clone(),
            mac: None,
        }]
    } else {
        Vec::new()
    };
    let from = match (&args.image, &args.kernel) {
        (Some(image), _) => image.clone(),
        (None, Some(kernel)) => kernel.display().to_string(),
        (None, None) => String::new(),
    };
    let spec = VmSpec {
        labels: std::collections::BTreeMap::new(),
        cpus: args.cpus,
        memory: args.memory,
        console: None,
        boot,
        disks,
        nics,
    };
    Ok((spec, from))
}

/// An image as the daemon understands it: it has another working directory.
fn image_name(image: &str) -> Result<String> {
    let path = Path::new(image);
    // A permission that only the daemon has must not look like a missing file.
    let missing = path
        .metadata()
        .is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
    if !missing {
        return absolute(path);
    }
    if image.contains(':') && !image.contains('/') {
        return Ok(image.to_owned());
    }
    Err(ImageMissing {
        image: image.to_owned(),
    }
    .into())
}

fn absolute(path: &Path) -> Result<String> {
    let shown = path.display().to_string();
    let path = std::path::absolute(path).os("resolve", shown)?;
    Ok(path.to_string_lossy().into_owned())
}

/// A name made from that of a file, which no VM has yet.
fn free_name(from: &str, vms: &[Vm]) -> String {
    let file = from.rsplit([':', '/']).next().unwrap_or(from);
    let stem = Path::new(file)
        .file_stem()
        .map_or_else(|| file.to_owned(), |s| s.to_string_lossy().into_owned());
    let mut base: String = stem
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "-_.".contains(c) {
                c
            } else {
                '-'
            }
        })
        .skip_while(|c| !c.is_ascii_alphanumeric())
        .take(MAX_MADE_NAME)
        .collect();
    if base.is_empty() {
        base.push_str("vm");
    }
    let taken = |name: &str| vms.iter().any(|vm| vm.name == name);
    if !taken(&base) {
        return base;
    }
    let mut number = 2_u64;
    while taken(&format!("{base}-{number}")) {
        number += 1;
    }
    format!("{base}-{number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_from_files() {
        assert_eq!(free_name("/images/debian 12.raw", &[]), "debian-12");
        assert_eq!(free_name("fast:web1.img", &[]), "web1");
        assert_eq!(free_name("...", &[]), "vm");
        assert_eq!(free_name("-", &[]), "vm");
        assert_eq!(free_name("", &[]), "vm");
        assert_eq!(free_name(&"x".repeat(500), &[]).len(), MAX_MADE_NAME);
    }

    #[test]
    fn an_image_is_a_path_or_in_a_datastore() {
        assert_eq!(image_name("fast:root.raw").unwrap(), "fast:root.raw");
        assert!(
            image_name("/nonexistent/a.raw")
                .unwrap_err()
                .is::<ImageMissing>()
        );
        assert!(image_name("Cargo.toml").unwrap().starts_with('/'));
    }
}
