//! The daemon's REST API, one method for each request.
//!
//! Each request has a connection of its own: a command makes few of them, and after a restart of
//! the daemon the next one simply finds the new one.

mod http;
mod steer;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;
use strake_api::job::{JobId, LimitsChange};
use strake_api::rest::{
    AddDatastore, Consolidate, CreateExport, CreateVm, Datastore, DiskTree, Export, HostInfo, Job,
    MigrateDisk, RestartVm, Restarted, StopVm, TakeSnapshot, Vm,
};
use strake_observe::{Recorded, Result};

pub use http::{Body, ConsoleReader, ConsoleStream, ConsoleWriter};

/// How long the daemon may take for an answer. Starting a VM on a slow, emulated host is the
/// longest of them.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long a consolidation of a stopped VM's disk may take: it copies.
const MERGE_PATIENCE: Duration = Duration::from_secs(24 * 3600);

/// What the daemon waits for a guest's shutdown if it is not told, and some.
const STOP_DEFAULT: Duration = Duration::from_secs(120);

/// A client of one daemon.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    /// The HTTP status of the last refusal, 0 for none.
    refusal: Arc<AtomicU16>,
}

/// What happens to the images of a VM that is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Disks {
    /// They stay.
    Keep,
    /// They are removed too.
    Delete,
}

impl Client {
    /// A client of the daemon that listens on `socket`. Nothing is connected yet.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            refusal: Arc::new(AtomicU16::new(0)),
        }
    }

    /// Where the daemon listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The HTTP status with which the daemon refused last, if it did.
    #[must_use]
    pub fn refusal(&self) -> Option<u16> {
        match self.refusal.load(Ordering::Relaxed) {
            0 => None,
            status => Some(status),
        }
    }

    /// What the daemon and its host are.
    ///
    /// # Errors
    /// As every method here: what the daemon refuses with, or that it cannot be reached.
    pub async fn host(&self) -> Result<HostInfo> {
        self.get("/v1/host").await
    }

    /// Every VM of the inventory.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn vms(&self) -> Result<Vec<Vm>> {
        self.get("/v1/vms").await
    }

    /// One VM.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn vm(&self, name: &str) -> Result<Vm> {
        self.get(&format!("/v1/vms/{}", segment(name))).await
    }

    /// Adds a VM to the inventory.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn create(&self, vm: &CreateVm) -> Result<Vm> {
        self.post("/v1/vms", vm, PATIENCE).await
    }

    /// Removes a VM from the inventory.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn remove(&self, name: &str, disks: Disks) -> Result<()> {
        let disks = match disks {
            Disks::Keep => "keep",
            Disks::Delete => "delete",
        };
        let path = format!("/v1/vms/{}?disks={disks}", segment(name));
        self.exchange::<()>(Method::DELETE, &path, None, PATIENCE)
            .await
            .map(|_| ())
    }

    /// Starts a VM.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn start(&self, name: &str) -> Result<Vm> {
        let path = format!("/v1/vms/{}/start", segment(name));
        self.post(&path, &serde_json::json!({}), PATIENCE).await
    }

    /// Stops a VM.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn stop(&self, name: &str, how: &StopVm) -> Result<Vm> {
        let path = format!("/v1/vms/{}/stop", segment(name));
        let patience = PATIENCE + how.timeout_s.map_or(STOP_DEFAULT, Duration::from_secs);
        self.post(&path, how, patience).await
    }

    /// Restarts a VM.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn restart(&self, name: &str, how: &RestartVm) -> Result<Restarted> {
        let path = format!("/v1/vms/{}/restart", segment(name));
        let patience = PATIENCE + how.timeout_s.map_or(STOP_DEFAULT, Duration::from_secs);
        self.post(&path, how, patience).await
    }

    /// The serial console's output so far, or its last `tail` bytes, piece by piece.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn log(&self, name: &str, tail: Option<u64>) -> Result<Body> {
        let mut path = format!("/v1/vms/{}/log", segment(name));
        if let Some(tail) = tail {
            path.push_str(&format!("?tail={tail}"));
        }
        http::download(self, &path, PATIENCE).await
    }

    /// The serial console, both ways.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn console(&self, name: &str) -> Result<ConsoleStream> {
        let path = format!("/v1/vms/{}/console", segment(name));
        http::upgrade(self, &path, PATIENCE).await
    }

    /// Starts the live migration of a disk.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn migrate(&self, vm: &str, disk: &str, how: &MigrateDisk) -> Result<Job> {
        let path = format!("/v1/vms/{}/disks/{}/migrate", segment(vm), segment(disk));
        self.post(&path, how, PATIENCE).await
    }

    /// Takes a snapshot of a disk.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn snapshot(&self, vm: &str, disk: &str, how: &TakeSnapshot) -> Result<Job> {
        self.post(&snapshots(vm, disk), how, PATIENCE).await
    }

    /// A disk's images and snapshots.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn disk_tree(&self, vm: &str, disk: &str) -> Result<DiskTree> {
        self.get(&snapshots(vm, disk)).await
    }

    /// Makes a disk what it was at a snapshot.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn revert(&self, vm: &str, disk: &str, snapshot: &str) -> Result<Job> {
        let path = format!("{}/{}/revert", snapshots(vm, disk), segment(snapshot));
        self.post(&path, &serde_json::json!({}), PATIENCE).await
    }

    /// Deletes a snapshot.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn delete_snapshot(&self, vm: &str, disk: &str, snapshot: &str) -> Result<DiskTree> {
        let path = format!("{}/{}", snapshots(vm, disk), segment(snapshot));
        let answer = self
            .exchange::<()>(Method::DELETE, &path, None, PATIENCE)
            .await?;
        answer.read()
    }

    /// Takes one image of a disk away; none if there is nothing to do. With a stopped VM the answer
    /// comes when it is done.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn consolidate(
        &self,
        vm: &str,
        disk: &str,
        how: &Consolidate,
    ) -> Result<Option<Job>> {
        let (vm, disk) = (segment(vm), segment(disk));
        let path = format!("/v1/vms/{vm}/disks/{disk}/consolidate");
        self.post(&path, how, MERGE_PATIENCE).await
    }

    /// Every job that the inventory knows.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn jobs(&self) -> Result<Vec<Job>> {
        self.get("/v1/jobs").await
    }

    /// One job.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn job(&self, id: &JobId) -> Result<Job> {
        self.get(&format!("/v1/jobs/{}", segment(&id.0))).await
    }

    /// Asks for the end of a job.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn cancel(&self, id: &JobId) -> Result<Job> {
        let path = format!("/v1/jobs/{}/cancel", segment(&id.0));
        self.post(&path, &serde_json::json!({}), PATIENCE).await
    }

    /// Lets a job rest.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn pause(&self, id: &JobId) -> Result<Job> {
        let path = format!("/v1/jobs/{}/pause", segment(&id.0));
        self.post(&path, &serde_json::json!({}), PATIENCE).await
    }

    /// Lets a paused job go on.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn resume(&self, id: &JobId) -> Result<Job> {
        let path = format!("/v1/jobs/{}/resume", segment(&id.0));
        self.post(&path, &serde_json::json!({}), PATIENCE).await
    }

    /// Changes a job's limits.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn set_job(&self, id: &JobId, change: &LimitsChange) -> Result<Job> {
        let path = format!("/v1/jobs/{}/set", segment(&id.0));
        self.post(&path, change, PATIENCE).await
    }

    /// Every datastore.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn datastores(&self) -> Result<Vec<Datastore>> {
        self.get("/v1/datastores").await
    }

    /// Adds a datastore.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn add_datastore(&self, store: &AddDatastore) -> Result<Datastore> {
        self.post("/v1/datastores", store, PATIENCE).await
    }

    /// Removes a datastore from the inventory; its directory stays.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn remove_datastore(&self, name: &str) -> Result<()> {
        let path = format!("/v1/datastores/{}", segment(name));
        self.exchange::<()>(Method::DELETE, &path, None, PATIENCE)
            .await
            .map(|_| ())
    }

    /// All exports.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn exports(&self) -> Result<Vec<Export>> {
        self.get("/v1/exports").await
    }

    /// One export.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn export(&self, name: &str) -> Result<Export> {
        self.get(&format!("/v1/exports/{}", segment(name))).await
    }

    /// Adds an export and serves it.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn create_export(&self, export: &CreateExport) -> Result<Export> {
        self.post("/v1/exports", export, PATIENCE).await
    }

    /// Serves an export again.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn start_export(&self, name: &str) -> Result<Export> {
        let path = format!("/v1/exports/{}/start", segment(name));
        self.post(&path, &serde_json::json!({}), PATIENCE).await
    }

    /// Ends an export; its image stays.
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn remove_export(&self, name: &str) -> Result<()> {
        let path = format!("/v1/exports/{}", segment(name));
        self.exchange::<()>(Method::DELETE, &path, None, PATIENCE)
            .await
            .map(|_| ())
    }

    /// What was observed after the sequence number `since` (0 for all).
    ///
    /// # Errors
    /// See [`Client::host`].
    pub async fn observations(&self, since: u64) -> Result<Vec<Recorded>> {
        self.get(&format!("/v1/observations?since={since}")).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let answer = self
            .exchange::<()>(Method::GET, path, None, PATIENCE)
            .await?;
        answer.read()
    }

    async fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
        patience: Duration,
    ) -> Result<T> {
        let answer = self
            .exchange(Method::POST, path, Some(body), patience)
            .await?;
        answer.read()
    }

    async fn exchange<B: Serialize>(
        &self,
        method: Method,
        path: &str,
        body: Option<&B>,
        patience: Duration,
    ) -> Result<http::Answer> {
        http::exchange(self, method, path, body, patience).await
    }
}

fn snapshots(vm: &str, disk: &str) -> String {
    format!("/v1/vms/{}/disks/{}/snapshots", segment(vm), segment(disk))
}

/// `text` as one segment of a path: everything but unreserved characters is escaped.
fn segment(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                char::from(byte).to_string()
            }
            _ => format!("%{byte:02X}"),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::segment;

    #[test]
    fn a_segment_cannot_leave_its_place() {
        assert_eq!(segment("web1.a_b-c~"), "web1.a_b-c~");
        assert_eq!(segment("a/../b?x=1"), "a%2F..%2Fb%3Fx%3D1");
        assert_eq!(segment("é"), "%C3%A9");
    }
}
