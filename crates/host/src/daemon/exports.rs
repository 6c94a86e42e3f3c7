//! Exports: disks that other programs use.
//!
//! An export is in the inventory like a VM: it has a name among theirs, a state, a monitor, and one
//! disk with a binding. Starting, supervising and finding it again after a restart of the daemon,
//! migrations of its disk and their recovery are those of VMs. What differs:
//!
//! * It runs as long as it exists: if its monitor dies, another one takes its place, at the same
//!   addresses, and clients that reconnect go on.
//! * It may stand for the disk of a VM that is stopped. Then both are bound to the same image, a
//!   migration's commit moves both bindings in one transaction, and the VM is not started before the
//!   export is gone.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use strake_api::control::{ExportConfig, FrontEndConfig, NbdConfig, Request, TlsFiles, Transport};
use strake_api::export::{DiskOf, ExportSource, ExportSpec, NbdListen};
use strake_api::rest::{CreateExport, Export, VmState};
use strake_api::spec::{DiskSpec, MAX_NAME, check_name};
use strake_observe::{Because, Observation, OsContext, Result};

use super::create::remove_directory;
use super::launch::{Launch, open_observations};
use super::live::state_name;
use super::{Host, guard, private, task};
use crate::inventory::{DiskRecord, VmRecord, Workload};
use crate::listen;
use crate::monitor::descriptors::Descriptors;
use crate::observations::{
    BadName, DiskExported, ExportFailed, ExportNotRemoved, ListenRefused, NoSuchDisk, NoSuchExport,
    RequestRefused, WrongState,
};

/// What the disk of an export of an image is called.
const DISK: &str = "disk";

/// How many queues a VMM may use: one for each of a guest's vCPUs. Those that it does not use cost
/// nothing.
const QUEUES: u16 = 16;

impl Host {
    /// Adds an export and serves it.
    ///
    /// # Errors
    /// [`ExportFailed`], with the reason; nothing is left behind then.
    pub fn create_export(self: &Arc<Self>, request: &CreateExport) -> Result<Export> {
        let name = &request.name;
        let failed = || ExportFailed {
            export: name.clone(),
        };
        task(format!("create export '{name}'"), failed, |task| {
            check_name(name, MAX_NAME).map_err(|reason| BadName {
                what: "export".to_owned(),
                name: name.clone(),
                reason,
            })?;
            let spec = spec(request)?;
            self.add_export(name, &spec, request)?;
            let started = self.start_named(name);
            if started.is_err() {
                // As if it had never been; a monitor that may or may not serve is ended.
                if let Err(more) = self.remove_export(name) {
                    task.saw(more);
                }
            }
            started
        })?;
        self.export(name)
    }

    fn add_export(&self, name: &str, spec: &ExportSpec, request: &CreateExport) -> Result<()> {
        match &spec.of {
            Some(of) => self.add_export_of(name, spec, of),
            None => {
                let disk = DiskSpec {
                    name: DISK.to_owned(),
                    image: request.source.clone(),
                    format: request.format,
                    size: None,
                    read_only: spec.read_only,
                    queues: None,
                    iops: None,
                    bandwidth: None,
                };
                let _placing = guard(&self.placing);
                let placed = self.place(&disk, 0)?;
                self.inventory.add_export(name, spec, &placed.record)
            }
        }
    }

    /// The VM's lock of operations is held: it is not started meanwhile.
    fn add_export_of(&self, name: &str, spec: &ExportSpec, of: &DiskOf) -> Result<()> {
        let cell = self.cell(&of.vm)?;
        let _operation = guard(&cell.operation);
        let record = self.inventory.vm(&of.vm)?;
        record.spec()?;
        let state = cell.live().state;
        if !matches!(state, VmState::Stopped | VmState::Failed) {
            return Err(WrongState {
                vm: of.vm.clone(),
                state: state_name(state).to_owned(),
                needed: "stopped".to_owned(),
                advice: "its guest uses the disk: stop it first".to_owned(),
            }
            .into());
        }
        self.refuse_living_monitor(&cell, &record)?;
        let disk = record.disks.iter().find(|disk| disk.name == of.disk);
        let disk = disk.ok_or_else(|| {
            let has: Vec<_> = record.disks.iter().map(|disk| disk.name.as_str()).collect();
            Observation::from(NoSuchDisk {
                vm: of.vm.clone(),
                disk: of.disk.clone(),
                has: has.join(", "),
            })
        })?;
        if disk.read_only && !spec.read_only {
            return Err(RequestRefused {
                reason: format!("disk '{}' of VM '{}' is read-only", of.disk, of.vm),
                advice: "export it with --read-only".to_owned(),
            }
            .into());
        }
        let disk = DiskRecord {
            slot: 0,
            read_only: spec.read_only,
            ..disk.clone()
        };
        let _placing = guard(&self.placing);
        self.inventory.add_export(name, spec, &disk)
    }

    /// Refuses what would use a disk of the VM that is exported.
    pub(super) fn refuse_exported(&self, vm: &str) -> Result<()> {
        match self.inventory.export_of(vm)? {
            Some((export, disk)) => Err(DiskExported {
                vm: vm.to_owned(),
                disk,
                export,
            }
            .into()),
            None => Ok(()),
        }
    }

    pub(super) fn export_record(&self, name: &str) -> Result<VmRecord> {
        let missing = || {
            Observation::from(NoSuchExport {
                export: name.to_owned(),
            })
        };
        let record = self.inventory.vm(name).map_err(|seen| {
            if seen.is::<crate::observations::NoSuchVm>() {
                return missing();
            }
            seen
        })?;
        match record.what {
            Workload::Export(_) => Ok(record),
            Workload::Vm(_) => Err(missing()),
        }
    }

    /// Serves an export again that could not be served before.
    ///
    /// # Errors
    /// As for a VM's start.
    pub fn start_export(self: &Arc<Self>, name: &str) -> Result<Export> {
        self.export_record(name)?;
        self.start_named(name)?;
        self.export(name)
    }

    /// Ends an export: what its clients have in flight is finished, the disk is flushed, and its name
    /// is free. The image stays.
    ///
    /// # Errors
    /// [`ExportNotRemoved`], with the reason.
    pub fn remove_export(self: &Arc<Self>, name: &str) -> Result<()> {
        let failed = || ExportNotRemoved {
            export: name.to_owned(),
        };
        let record = self.export_record(name)?;
        let cell = self.cell(name)?;
        task(format!("remove export '{name}'"), failed, |task| {
            self.end_export(&cell, task)?;
            let _operation = guard(&cell.operation);
            let state = cell.live().state;
            if !matches!(state, VmState::Stopped | VmState::Failed) {
                return Err(WrongState {
                    vm: name.to_owned(),
                    state: state_name(state).to_owned(),
                    needed: "stopped".to_owned(),
                    advice: "try again: it was started meanwhile".to_owned(),
                }
                .into());
            }
            self.refuse_living_monitor(&cell, &self.inventory.vm(name)?)?;
            self.end_all_interrupted(&cell)?;
            let _placing = guard(&self.placing);
            self.inventory.remove_vm(name)?;
            self.forget_cell(name);
            if let Workload::Export(spec) = &record.what {
                for socket in sockets(spec) {
                    if let Err(seen) = listen::remove(&socket) {
                        task.saw(seen);
                    }
                }
            }
            let mut left = [self.config.vm_state(name), self.config.vm_run(name)]
                .iter()
                .filter_map(|directory| remove_directory(directory))
                .collect::<Vec<_>>();
            left.pop().map_or(Ok(()), Err)
        })
    }

    /// Opens everything that an export's monitor needs.
    pub(super) fn prepare_export(&self, record: &VmRecord, spec: &ExportSpec) -> Result<Launch> {
        let mut fds = Descriptors::default();
        let disk = record.disks.first().ok_or_else(|| NoSuchExport {
            export: record.name.clone(),
        })?;
        let (config, file) = self.disk(record, disk, QUEUES, None, &mut fds)?;
        let mut front_ends = Vec::new();
        if let Some(socket) = &spec.vhost_user {
            front_ends.push(FrontEndConfig::VhostUser {
                listener: fds.add(listen::unix(Path::new(socket))?)?,
            });
        }
        if let Some(nbd) = &spec.nbd {
            let (listener, transport) = match nbd {
                NbdListen::Unix(path) => (listen::unix(Path::new(path))?, Transport::Unix),
                NbdListen::Tcp { host, port } => (listen::tcp(host, *port)?, Transport::Tcp),
            };
            front_ends.push(FrontEndConfig::Nbd(NbdConfig {
                listener: fds.add(listener)?,
                transport,
                name: record.name.clone(),
                tls: match &spec.tls_dir {
                    Some(directory) => Some(tls_files(directory, &mut fds)?),
                    None => None,
                },
            }));
        }
        private(&self.config.vm_state(&record.name))?;
        private(&self.config.vm_run(&record.name))?;
        let observations = open_observations(&self.config.monitor_observations(&record.name))?;
        let observations = Some(fds.add(observations)?);
        Ok(Launch {
            configure: Request::ConfigureExport(Box::new(ExportConfig {
                export: record.name.clone(),
                disk: config,
                front_ends,
                observations,
            })),
            files: vec![(disk.name.clone(), file)],
            spec: None,
            fds,
        })
    }
}

/// The unix sockets of an export.
fn sockets(spec: &ExportSpec) -> Vec<PathBuf> {
    let nbd = spec.nbd.as_ref().and_then(|nbd| match nbd {
        NbdListen::Unix(path) => Some(path),
        NbdListen::Tcp { .. } => None,
    });
    spec.vhost_user
        .iter()
        .chain(nbd)
        .map(PathBuf::from)
        .collect()
}

/// What is asked for, if it makes sense.
fn spec(request: &CreateExport) -> Result<ExportSpec> {
    let refused = |reason: &str, advice: &str| {
        Observation::from(RequestRefused {
            reason: reason.to_owned(),
            advice: advice.to_owned(),
        })
    };
    let spec = ExportSpec {
        of: match ExportSource::parse(&request.source) {
            ExportSource::Disk(of) => Some(of),
            ExportSource::Image(_) => None,
        },
        read_only: request.read_only,
        vhost_user: request.vhost_user.clone(),
        nbd: request.nbd.clone(),
        tls_dir: request.tls_dir.clone(),
    };
    if spec.vhost_user.is_none() && spec.nbd.is_none() {
        return Err(refused(
            "nobody could use the export",
            "say where clients find it: --vhost-user SOCKET or --nbd SOCKET or HOST:PORT",
        ));
    }
    if spec.of.is_some() && request.format.is_some() {
        return Err(refused(
            "the format of a VM's disk is known",
            "leave the format out",
        ));
    }
    if let Some(directory) = &spec.tls_dir {
        if spec.nbd.is_none() {
            return Err(refused("only NBD has TLS", "leave --tls-dir out"));
        }
        // Seen now rather than at the first client.
        strake_nbd::TlsServer::from_directory(Path::new(directory))?;
    }
    if let Some(nbd) = &spec.nbd
        && spec.tls_dir.is_none()
        && !nbd.is_local()
    {
        return Err(ListenRefused {
            address: nbd.to_string(),
            reason: "without TLS whoever reaches this host could read and write the disk; \
                     only unix sockets and loopback addresses go without"
                .to_owned(),
        }
        .into());
    }
    let paths = sockets(&spec);
    if let [one, other] = paths.as_slice()
        && one == other
    {
        return Err(refused(
            "both front-ends would have the same socket",
            "give each a socket of its own",
        ));
    }
    for path in &paths {
        listen::admit(path)?;
    }
    Ok(spec)
}

fn tls_files(directory: &str, fds: &mut Descriptors) -> Result<TlsFiles> {
    let mut open = |name: &str| {
        let path = Path::new(directory).join(name);
        let file = File::open(&path)
            .os("open", path.display())
            .because_of(|| ListenRefused {
                address: directory.to_owned(),
                reason: "a file for TLS cannot be read".to_owned(),
            })?;
        fds.add(file)
    };
    Ok(TlsFiles {
        authority: open("ca-cert.pem")?,
        certificate: open("server-cert.pem")?,
        key: open("server-key.pem")?,
    })
}
