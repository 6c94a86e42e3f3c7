//! `strake export`

use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde_json::json;
use strake_api::export::{ExportSource, NbdListen};
use strake_api::image::ImageFormat;
use strake_api::rest::{CreateExport, Export};
use strake_observe::{OsContext, Result};

use crate::context::Context;
use crate::exit::Exit;
use crate::output::{Align, Table};
use crate::units;

/// Let other programs use a disk, with live migration underneath
#[derive(Debug, clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "\
Examples:
  strake export web1/root --vhost-user /run/vm/root.sock
  strake export fast:data.qcow2 --nbd /run/nbd/data.sock --name data
  strake export /srv/a.raw --nbd 192.0.2.1:10809 --tls-dir /etc/strake/tls --read-only
  strake export ls
  strake disk migrate web1-root root --to fast
  strake export rm web1-root

QEMU uses a vhost-user export by
  -object memory-backend-memfd,id=mem,size=1G,share=on -machine memory-backend=mem
  -chardev socket,id=disk,path=/run/vm/root.sock,reconnect-ms=1000
  -device vhost-user-blk-pci,chardev=disk

A VM's disk is exported while the VM is stopped; the VM is not started before the export is gone."
)]
pub struct Args {
    /// What to do with exports
    #[command(subcommand)]
    pub command: Option<Exports>,

    /// VM/DISK of a stopped VM, DATASTORE:FILE, or the path of an image
    #[arg(required = true)]
    pub source: Option<String>,

    /// Serve it by vhost-user-blk at this unix socket, for VMMs
    #[arg(long, value_name = "SOCKET")]
    pub vhost_user: Option<PathBuf>,

    /// Serve it by NBD at this unix socket or address
    #[arg(long, value_name = "SOCKET|HOST:PORT")]
    pub nbd: Option<String>,

    /// Serve only NBD clients with a certificate by the authority in this directory
    #[arg(long, value_name = "DIR", requires = "nbd")]
    pub tls_dir: Option<PathBuf>,

    /// What the export is called [default: after the disk or file]
    #[arg(long)]
    pub name: Option<String>,

    /// The image's format [default: qcow2 if its name ends in .qcow2, else raw]
    #[arg(long)]
    pub format: Option<ImageFormat>,

    /// Let clients only read
    #[arg(long)]
    pub read_only: bool,
}

/// What can be done with exports.
#[derive(Debug, Subcommand)]
pub enum Exports {
    /// List the exports
    #[command(after_help = "Example:\n  strake export ls")]
    Ls,
    /// Show an export
    #[command(after_help = "Example:\n  strake export show web1-root --json | jq -r .nbd_uri")]
    Show {
        /// Its name
        name: String,
    },
    /// Serve an export again that could not be served, for example because its store was away
    #[command(after_help = "Example:\n  strake export start web1-root")]
    Start {
        /// Its name
        name: String,
    },
    /// End an export: its clients are disconnected, the image stays
    #[command(after_help = "Example:\n  strake export rm web1-root")]
    Rm {
        /// Its name
        name: String,
    },
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    let client = &context.client;
    match args.command {
        None => create(args, context).await?,
        Some(Exports::Ls) => {
            let exports = client.exports().await?;
            context.output.answer(&exports, |exports| table(exports))?;
        }
        Some(Exports::Show { name }) => {
            let export = client.export(&name).await?;
            context
                .output
                .answer(&export, |export| table(std::slice::from_ref(export)))?;
        }
        Some(Exports::Start { name }) => {
            let export = client.start_export(&name).await?;
            context
                .output
                .answer(&export, |export| format!("{} is served\n", export.name))?;
        }
        Some(Exports::Rm { name }) => {
            client.remove_export(&name).await?;
            context.output.answer(&json!({ "removed": name }), |_| {
                format!("export {name} ended; its image stays\n")
            })?;
        }
    }
    Ok(Exit::Done)
}

async fn create(args: Args, context: &Context) -> Result<()> {
    let source = args.source.unwrap_or_default();
    // The daemon has another working directory.
    let source = match ExportSource::parse(&source) {
        ExportSource::Image(path) if !path.contains(':') => absolute(Path::new(&path))?,
        _ => source,
    };
    let nbd = match args.nbd {
        None => None,
        Some(address) => Some(listen(&address)?),
    };
    let request = CreateExport {
        name: args.name.unwrap_or_else(|| default_name(&source)),
        source,
        format: args.format,
        read_only: args.read_only,
        vhost_user: args.vhost_user.as_deref().map(absolute).transpose()?,
        nbd,
        tls_dir: args.tls_dir.as_deref().map(absolute).transpose()?,
    };
    let export = context.client.create_export(&request).await?;
    context.output.answer(&export, |export| {
        let addresses = addresses(export).join(" and ");
        format!(
            "{} is served at {addresses}; move it with `strake disk migrate {} {} --to DATASTORE`\n",
            export.name, export.name, export.disk.name
        )
    })
}

fn absolute(path: &Path) -> Result<String> {
    let path = std::path::absolute(path).os("resolve", path.display())?;
    Ok(path.to_string_lossy().into_owned())
}

/// A path, if it looks like one, else HOST:PORT.
fn listen(address: &str) -> Result<NbdListen> {
    let text = match address.contains('/') || !address.contains(':') {
        true => absolute(Path::new(address))?,
        false => address.to_owned(),
    };
    text.parse()
        .map_err(|reason| crate::observations::AddressUnusable { reason }.into())
}

/// `web1/root` is web1-root, and an image is called like its file, less what follows the last dot.
fn default_name(source: &str) -> String {
    if let ExportSource::Disk(of) = ExportSource::parse(source) {
        return format!("{}-{}", of.vm, of.disk);
    }
    let file = source.rsplit(['/', ':']).next().unwrap_or(source);
    match file.rsplit_once('.') {
        Some((stem, _)) if !stem.is_empty() => stem.to_owned(),
        _ => file.to_owned(),
    }
}

fn addresses(export: &Export) -> Vec<String> {
    let vhost_user = export.spec.vhost_user.iter();
    let vhost_user = vhost_user.map(|socket| format!("vhost-user:{socket}"));
    vhost_user.chain(export.nbd_uri.clone()).collect()
}

fn table(exports: &[Export]) -> String {
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("STATE", Align::Left),
        ("DISK", Align::Left),
        ("SIZE", Align::Right),
        ("IMAGE", Align::Left),
        ("ADDRESS", Align::Left),
    ]);
    for export in exports {
        table.row([
            export.name.clone(),
            super::ps::state(export.state).to_owned(),
            export.disk.name.clone(),
            units::bytes(export.disk.size_bytes),
            export.disk.image.clone(),
            addresses(export).join(" "),
        ]);
    }
    table.render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exports_are_called_after_what_they_are() {
        for (source, name) in [
            ("web1/root", "web1-root"),
            ("fast:data.qcow2", "data"),
            ("/srv/a.b.raw", "a.b"),
            ("/dev/vg0/lv1", "lv1"),
            (".raw", ".raw"),
        ] {
            assert_eq!(default_name(source), name);
        }
    }

    #[test]
    fn an_address_is_a_path_or_a_port() {
        let tcp = listen("localhost:10809").unwrap();
        assert_eq!(tcp.to_string(), "localhost:10809");
        assert!(listen("a.sock").unwrap().to_string().ends_with("/a.sock"));
        assert!(listen("host:none").is_err());
    }
}
