//! An export: a machine whose disk is used by other programs instead of a guest.
//!
//! It has no vCPUs and needs no KVM. Its front-ends are its components: started with the machine,
//! quiesced when it stops, and nothing of them is left in flight when the disk is flushed at the
//! end. A migration that would pause the guest finds none; for the front-ends' clients a switch-over
//! is one slow request, as it is for a guest.

use std::fs::File;
use std::io::Read;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use strake_api::control::{ExportConfig, FrontEndConfig, NbdConfig, TlsFiles, Transport};
use strake_block::LiveDisk;
use strake_devices::lifecycle::{Component, Phase, PhaseCell};
use strake_devices::observations::QuiesceTimeout;
use strake_devices::virtio::{QUIESCE_BOUND, VhostUserServer, VirtioDevice};
use strake_nbd::server::{Listener, Server, ServerConfig};
use strake_nbd::{Identity, LiveExport, TlsServer};
use strake_observe::{Because, OsContext, Result};
use strake_state::Records;

use crate::build::{blk, check_disk, open_disk};
use crate::jobs::Jobs;
use crate::observations::{BadConfig, BuildFailed};
use crate::vcpus::Vcpus;
use crate::{Descriptors, Machine, Mailbox, threads};

/// Most bytes of a file with certificates.
const PEM_LIMIT: u64 = 1 << 20;

impl Machine {
    /// Builds the export that `config` describes out of the descriptors that came with it. It is
    /// not served yet.
    ///
    /// # Errors
    /// [`BadConfig`] if it describes none, [`BuildFailed`] with the step that failed.
    pub fn export(
        config: ExportConfig,
        fds: &mut Descriptors,
        mailbox: &Arc<Mailbox>,
    ) -> Result<Arc<Self>> {
        check(&config)?;
        let failed = |step: &str| BuildFailed {
            vm: config.export.clone(),
            step: step.to_owned(),
        };
        if let Some(file) = config.observations {
            let file = fds.take(file, "the file for observations");
            let file = file.because_of(|| failed("keeping observations"))?;
            strake_observe::recorder().outlive(strake_observe::Ring::new(File::from(file)));
        }
        let disk =
            open_disk(&config.disk, fds, mailbox).because_of(|| failed("opening its disk"))?;
        let mut components: Vec<Arc<dyn Component>> = Vec::new();
        for front_end in &config.front_ends {
            let built = match front_end {
                FrontEndConfig::VhostUser { listener } => {
                    let device: Arc<dyn VirtioDevice> = Arc::new(blk(&config.disk, &disk)?);
                    fds.take(*listener, "the vhost-user socket")
                        .and_then(|listener| VhostUserServer::new(device, listener))
                        .map(|server| Arc::new(server) as Arc<dyn Component>)
                }
                FrontEndConfig::Nbd(nbd) => NbdFrontEnd::new(nbd, &disk, fds)
                    .map(|server| Arc::new(server) as Arc<dyn Component>),
            };
            components.push(built.because_of(|| failed("preparing its front-ends"))?);
        }
        Ok(Arc::new(Self {
            name: config.export,
            run: Mutex::default(),
            vcpus: Vcpus::none(),
            components,
            disks: vec![disk],
            jobs: Jobs::default(),
            mailbox: Arc::clone(mailbox),
            guest: None,
        }))
    }
}

fn check(config: &ExportConfig) -> Result<()> {
    let missing = if config.export.is_empty() {
        "the export has no name"
    } else if config.disk.name.is_empty() {
        "its disk has no name"
    } else if config.front_ends.is_empty() {
        "nobody could use it: it has no front-end"
    } else {
        return check_disk(&config.export, &config.disk);
    };
    Err(BadConfig {
        vm: config.export.clone(),
        reason: missing.to_owned(),
    }
    .into())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An NBD server as a component.
#[derive(Debug)]
struct NbdFrontEnd {
    name: String,
    /// By what its clients ask for the disk.
    export: String,
    disk: LiveExport,
    listener: OwnedFd,
    transport: Transport,
    tls: Option<TlsServer>,
    phase: PhaseCell,
    server: Mutex<Option<Server>>,
}

impl NbdFrontEnd {
    fn new(config: &NbdConfig, disk: &Arc<LiveDisk>, fds: &mut Descriptors) -> Result<Self> {
        let tls = config.tls.as_ref();
        Ok(Self {
            name: format!("nbd-{}", disk.name()),
            export: config.name.clone(),
            disk: LiveExport::new(Arc::clone(disk)),
            listener: fds.take(config.listener, "the NBD socket")?,
            transport: config.transport,
            tls: tls.map(|files| tls_server(files, fds)).transpose()?,
            phase: PhaseCell::default(),
            server: Mutex::default(),
        })
    }

    fn launch(&self) -> Result<()> {
        let listener = self.listener.try_clone().os("dup", &self.name)?;
        let listener = match self.transport {
            Transport::Unix => Listener::from_unix(UnixListener::from(listener))?,
            Transport::Tcp => Listener::from_tcp(TcpListener::from(listener))?,
        };
        let config = ServerConfig {
            exports: vec![(self.export.clone(), Arc::new(self.disk.clone()))],
            tls: self.tls.clone(),
        };
        let server = Server::start(config, vec![listener])?;
        *lock(&self.server) = Some(server);
        Ok(())
    }

    fn end(&self) -> Result<()> {
        let Some(server) = lock(&self.server).take() else {
            return Ok(());
        };
        // What is in flight may wait for a gate that is closed: not here.
        let (done, ended) = channel();
        threads::spawn("nbd-stop", move || {
            server.stop();
            // Nobody may wait any more.
            let _ = done.send(());
        })?;
        ended.recv_timeout(QUIESCE_BOUND).map_err(|_| {
            QuiesceTimeout {
                device: self.name.clone(),
                waited_ms: u64::try_from(QUIESCE_BOUND.as_millis()).unwrap_or(u64::MAX),
            }
            .into()
        })
    }
}

impl Component for NbdFrontEnd {
    fn name(&self) -> &str {
        &self.name
    }

    fn phase(&self) -> Phase {
        self.phase.get()
    }

    fn start(&self) -> Result<()> {
        let step = (Phase::Prepared, Phase::Running);
        self.phase.step(&self.name, "start", step, || self.launch())
    }

    /// Its clients are disconnected once what they have in flight is answered. If that takes longer
    /// than [`QUIESCE_BOUND`], nothing new is taken from them all the same.
    fn quiesce(&self) -> Result<()> {
        let step = (Phase::Running, Phase::Quiesced);
        self.phase.step(&self.name, "quiesce", step, || self.end())
    }

    fn resume(&self) -> Result<()> {
        let step = (Phase::Quiesced, Phase::Running);
        self.phase
            .step(&self.name, "resume", step, || self.launch())
    }

    /// Nothing: an NBD client that reconnects says again what it wants.
    fn save(&self, _: &mut Records) -> Result<()> {
        let step = (Phase::Quiesced, Phase::Quiesced);
        self.phase.step(&self.name, "be saved", step, || Ok(()))
    }

    fn sketch(&self, _: &mut Records) -> Result<()> {
        Ok(()) // It has nothing that takes long.
    }

    fn prepare(&self, _: &mut Records) -> Result<()> {
        Ok(())
    }

    fn restore(&self, _: &mut Records) -> Result<()> {
        let step = (Phase::Prepared, Phase::Quiesced);
        self.phase.step(&self.name, "be restored", step, || Ok(()))
    }
}

fn tls_server(files: &TlsFiles, fds: &mut Descriptors) -> Result<TlsServer> {
    let mut read = |index, what: &str| -> Result<Vec<u8>> {
        let file = File::from(fds.take(index, what)?);
        let mut bytes = Vec::new();
        file.take(PEM_LIMIT)
            .read_to_end(&mut bytes)
            .os("read", what)?;
        Ok(bytes)
    };
    let authority = read(files.authority, "the authority's certificate")?;
    let identity = Identity {
        certificates: read(files.certificate, "the server's certificate")?,
        key: read(files.key, "the server's key")?,
    };
    TlsServer::new(&identity, Some(&authority))
}

#[cfg(test)]
mod tests;
