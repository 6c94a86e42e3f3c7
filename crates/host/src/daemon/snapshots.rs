//! Snapshots: taken, gone back to, deleted; and what they leave, consolidated.
//!
//! Everything that changes which image a disk is bound to is a job of the inventory, like a
//! migration: recorded, its file made and recorded, committed by one transaction, cleared up. With a
//! running VM the monitor asks for the commit when its disk's gate is closed (`commit`); without one
//! the daemon does all of it here, under the VM's locks. So a crash at any instant leaves what a
//! migration's would (`settle`):
//!
//! | job | before the commit | after it |
//! | --- | --- | --- |
//! | snapshot, revert | bound to the old image; the new one is removed | bound to the new image, which is based on the layer |
//! | consolidate | bound to the upper image; the one below may have got some of what it hides, and is not removed | bound to the one below; the upper one is removed |
//!
//! A consolidation writes to the image below only where the upper one hides it, so the disk reads the
//! same at any instant, and whoever begins it again repeats what was done. But the image below is
//! not what it was any more: so it must not be a snapshot, nor below anything else.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use strake_api::control::MAX_FDS;
use strake_api::job::{JobId, JobKind, MigrationLimits, Phase};
use strake_api::rest::{Consolidate, DiskTree, Job, TakeSnapshot, VmState};
use strake_api::spec::{MAX_NAME, check_name};
use strake_observe::{Observation, Result};
use strake_qcow2::MAX_LAYERS;

use super::live::{Cell, Monitor, state_name};
use super::migrate::{check_limits, refuse_existing, running_size};
use super::tree::{chain_of, children, disk_of};
use super::{Host, guard, task};
use crate::config::show;
use crate::crash;
use crate::inventory::{DiskRecord, JobState, LayerRecord, NewJob, VmRecord};
use crate::observations::{
    BadName, ImageRefused, NoSnapshots, NoSuchSnapshot, SnapshotExists, SnapshotRefused, WrongState,
};
use crate::storage::chain::{self, OpenImage};
use crate::storage::image::Mode;
use crate::storage::merge;
use crate::storage::store;
use crate::{Binding, FileIdentity, Location};

/// How long a snapshot of a running VM is waited for; it goes on all the same.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(20);

/// How often it is looked whether it is done.
const LOOK: Duration = Duration::from_millis(10);

/// Descriptors that a machine needs beside those of its disks and interfaces, at most.
const OTHER_FILES: usize = 5;

/// Whether the monitor or the daemon does a job.
enum Where {
    Monitor(Arc<Monitor>),
    Here,
}

impl Host {
    /// Takes a snapshot of a disk, whether its VM runs or not.
    ///
    /// # Errors
    /// [`SnapshotRefused`], with the reason; the disk is as it was.
    pub fn snapshot(&self, vm: &str, disk: &str, request: &TakeSnapshot) -> Result<Job> {
        let cell = self.cell(vm)?;
        let id = task(
            format!("take a snapshot of disk '{disk}' of VM '{vm}'"),
            refused("take a snapshot of", vm, disk),
            |_| {
                check_limits(&request.limits)?;
                let _operation = guard(&cell.operation);
                let record = self.inventory.vm(vm)?;
                let bound = disk_of(&record, disk)?;
                let place = self.place_of_work(&cell, &record, None)?;
                let name = snapshot_name(bound, request.name.as_deref())?;
                let (destination, to) = self.place_overlay(bound, request.to.as_deref())?;
                let mut new = NewJob {
                    kind: JobKind::Snapshot,
                    snapshot: Some(name),
                    ..layer_job(&record, bound, &destination, to, &request.limits)
                };
                new.size = self.size_for_overlay(&record, bound, &place)?;
                self.do_job(&cell, &place, &new, Some(&bound.image))
            },
        )?;
        self.ended_soon(&id)
    }

    /// Makes a disk what it was at a snapshot. What was written since is gone, unless another
    /// snapshot has it.
    ///
    /// # Errors
    /// [`SnapshotRefused`], with the reason; for example because the VM runs.
    pub fn revert(&self, vm: &str, disk: &str, snapshot: &str) -> Result<Job> {
        let cell = self.cell(vm)?;
        let id = task(
            format!("revert disk '{disk}' of VM '{vm}'"),
            refused("revert", vm, disk),
            |_| {
                let _operation = guard(&cell.operation);
                let record = self.inventory.vm(vm)?;
                let bound = disk_of(&record, disk)?;
                let layer = named(bound, snapshot)?;
                let place = self.place_of_work(&cell, &record, Some("reverted"))?;
                let (destination, to) = self.place_overlay(bound, None)?;
                let looks = chain::look(&layer.image, &self.allowed_below()?)?;
                let looks = looks.ok_or_else(|| missing(&layer.image.location))?;
                let new = NewJob {
                    kind: JobKind::Revert,
                    snapshot: Some(snapshot.to_owned()),
                    layer: Some(layer.id),
                    size: looks.size,
                    remove_source: bound.created,
                    ..layer_job(
                        &record,
                        bound,
                        &destination,
                        to,
                        &MigrationLimits::default(),
                    )
                };
                self.do_job(&cell, &place, &new, Some(&layer.image))
            },
        )?;
        self.job(&id)
    }

    /// Deletes a snapshot. Its image goes as soon as no other image of the disk is based on it.
    ///
    /// # Errors
    /// [`SnapshotRefused`], with the reason.
    pub fn delete_snapshot(&self, vm: &str, disk: &str, snapshot: &str) -> Result<DiskTree> {
        let cell = self.cell(vm)?;
        task(
            format!("delete a snapshot of disk '{disk}' of VM '{vm}'"),
            refused("delete a snapshot of", vm, disk),
            |_| {
                let _operation = guard(&cell.operation);
                let record = self.inventory.vm(vm)?;
                named(disk_of(&record, disk)?, snapshot)?;
                self.inventory.forget_snapshot(vm, disk, snapshot)?;
                crash::point("after-snapshot-forgotten");
                let _jobs = guard(&cell.jobs);
                self.drop_unneeded(vm);
                Ok(())
            },
        )?;
        self.disk_tree(vm, disk)
    }

    /// Moves what a disk's image has into the one below it, if no snapshot needs that one as it is;
    /// `None` if there is nothing to do. What is done takes one image away: who wants one only asks
    /// again.
    ///
    /// # Errors
    /// [`SnapshotRefused`], with the reason.
    pub fn consolidate(&self, vm: &str, disk: &str, request: &Consolidate) -> Result<Option<Job>> {
        let cell = self.cell(vm)?;
        let id = task(
            format!("consolidate disk '{disk}' of VM '{vm}'"),
            refused("consolidate", vm, disk),
            |_| {
                check_limits(&request.limits)?;
                let _operation = guard(&cell.operation);
                let record = self.inventory.vm(vm)?;
                let place = self.place_of_work(&cell, &record, None)?;
                let record = self.without_names(record, disk, request)?;
                let bound = disk_of(&record, disk)?;
                let Some(layer) = self.mergeable(&record, bound)? else {
                    return Ok(None);
                };
                let new = NewJob {
                    kind: JobKind::Consolidate,
                    layer: Some(layer.id),
                    destination: layer.image.clone(),
                    to: layer.datastore.clone().unwrap_or_default(),
                    remove_source: bound.created,
                    ..layer_job(
                        &record,
                        bound,
                        Path::new("/"),
                        String::new(),
                        &request.limits,
                    )
                };
                self.do_job(&cell, &place, &new, None).map(Some)
            },
        )?;
        id.map(|id| self.job(&id)).transpose()
    }

    /// Deletes the names of the snapshots that the disk of now is based on, if that was asked for.
    fn without_names(
        &self,
        record: VmRecord,
        disk: &str,
        request: &Consolidate,
    ) -> Result<VmRecord> {
        if !request.all {
            return Ok(record);
        }
        for layer in chain_of(disk_of(&record, disk)?) {
            if let Some(name) = &layer.name {
                self.inventory.forget_snapshot(&record.name, disk, name)?;
            }
        }
        self.inventory.vm(&record.name)
    }

    /// The layer below a disk's image, if it may be written.
    fn mergeable<'a>(
        &self,
        record: &VmRecord,
        disk: &'a DiskRecord,
    ) -> Result<Option<&'a LayerRecord>> {
        let Some(layer) = chain_of(disk).into_iter().next() else {
            return Ok(None);
        };
        if layer.name.is_some() || children(disk, layer.id) != 1 {
            return Ok(None);
        }
        let path = layer.image.file()?;
        if self.is_below_other_disks(&record.name, &disk.name, path)? {
            return Err(ImageRefused {
                path: show(path),
                reason: "the disk of another VM is based on it as well".to_owned(),
                advice: "migrate that disk first: it gets an image of its own then".to_owned(),
            }
            .into());
        }
        Ok(Some(layer))
    }

    /// Who is to do a job on the VM's disks now. `only_stopped` is what is done to a disk, if its
    /// VM must not run then.
    fn place_of_work(
        &self,
        cell: &Cell,
        record: &VmRecord,
        only_stopped: Option<&str>,
    ) -> Result<Where> {
        let name = &record.name;
        record.spec()?;
        self.refuse_exported(name)?;
        let (state, monitor) = {
            let live = cell.live();
            (live.state, live.monitor.clone())
        };
        match (state, monitor, only_stopped) {
            (VmState::Running | VmState::Paused | VmState::Stopping, Some(monitor), None) => {
                Ok(Where::Monitor(monitor))
            }
            (VmState::Stopped | VmState::Failed, None, _) => {
                self.refuse_living_monitor(cell, record)?;
                Ok(Where::Here)
            }
            (state, _, done) => Err(WrongState {
                vm: name.clone(),
                state: state_name(state).to_owned(),
                needed: if done.is_some() {
                    "stopped"
                } else {
                    "stopped or running"
                }
                .to_owned(),
                advice: match done {
                    Some(done) => format!(
                        "a disk is {done} while its guest does not use it: `strake stop {name}`"
                    ),
                    None => "wait until it runs or has stopped".to_owned(),
                },
            }
            .into()),
        }
    }

    fn do_job(
        &self,
        cell: &Cell,
        place: &Where,
        new: &NewJob,
        below: Option<&Binding>,
    ) -> Result<JobId> {
        match place {
            Where::Monitor(monitor) => self.begin(cell, monitor, new, below),
            Where::Here => self.do_here(cell, new, below),
        }
    }

    /// Does a job on a disk that no monitor uses, and sees that this is so.
    fn do_here(&self, cell: &Cell, new: &NewJob, below: Option<&Binding>) -> Result<JobId> {
        let _jobs = guard(&cell.jobs);
        let user = |path: &Path| self.who_uses(&new.vm, path);
        let record = self.inventory.vm(&new.vm)?;
        let recorded = &disk_of(&record, &new.disk)?.below;
        let held = chain::open(&new.source, Mode::Write, recorded, &user)?;
        let (job, files) = self.prepare_job(new, below)?;
        let done = self.do_held(&held, new, &files.destination).and_then(|()| {
            crash::point("before-commit");
            self.inventory.commit_job(&job.id)
        });
        // Nobody may be kept by our locks from removing what is not needed any more.
        drop((held, files));
        match done {
            Ok(()) => {
                crash::point("after-commit-before-reply");
                let mut status = job.status.clone();
                status.phase = Phase::Completed;
                self.finish_committed(&job, &status);
                Ok(job.id)
            }
            Err(seen) => {
                // Whether it was committed after all, the inventory says.
                match self.inventory.job(&job.id) {
                    Ok(now) => self.settle(&now, seen.clone()),
                    Err(other) => super::note(other),
                }
                match self.inventory.job(&job.id) {
                    Ok(now) if now.status.phase == Phase::Completed => Ok(job.id),
                    _ => Err(seen),
                }
            }
        }
    }

    fn do_held(
        &self,
        held: &OpenImage,
        new: &NewJob,
        destination: &std::os::fd::OwnedFd,
    ) -> Result<()> {
        if new.kind != JobKind::Consolidate {
            return Ok(());
        }
        merge::into_below(held, &new.destination, destination)?;
        crash::point("after-merge");
        Ok(())
    }

    /// Where a new image over a disk's own goes: beside it, or into a datastore.
    fn place_overlay(&self, disk: &DiskRecord, to: Option<&str>) -> Result<(PathBuf, String)> {
        let path = disk.image.file()?;
        let (directory, to) = match to {
            Some(to) => {
                let store = self.inventory.datastore(to)?;
                (store.path, store.name)
            }
            None if path.starts_with("/dev") => {
                return Err(no_snapshots(
                    disk,
                    "its image is a block device, beside which no file can be",
                    "name the datastore for what is written from now on: --to DATASTORE",
                ));
            }
            None => {
                let directory = path.parent().unwrap_or(Path::new("/"));
                (
                    directory.to_owned(),
                    disk.datastore.clone().unwrap_or_default(),
                )
            }
        };
        if !to.is_empty() {
            store::require_room(&to, &directory, 0)?;
        }
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let stem = stem(&name);
        for number in 1..=u32::MAX {
            let path = directory.join(format!("{stem}.{number}.qcow2"));
            let location = Location::File(path.clone());
            if refuse_existing(&path).is_ok()
                && self.inventory.users_of_image(&location)?.is_empty()
                && self.inventory.layers_at(&location)?.is_empty()
            {
                return Ok((path, to));
            }
        }
        Err(no_snapshots(
            disk,
            "no name is free",
            "remove files that nobody needs",
        ))
    }

    /// The size that an image over a disk's own is to have, if it may have one.
    fn size_for_overlay(&self, vm: &VmRecord, disk: &DiskRecord, place: &Where) -> Result<u64> {
        if disk.read_only {
            let advice = "it does not change: nothing is to be kept";
            return Err(no_snapshots(disk, "the guest may only read it", advice));
        }
        let allowed = self.allowed_below()?;
        let looks = chain::look(&disk.image, &allowed)?;
        let looks = looks.ok_or_else(|| missing(&disk.image.location))?;
        let path = disk.image.file()?;
        if let (Some(given), Some(found)) = (&disk.file, FileIdentity::at(path)?)
            && !found.is(given)
            && matches!(place, Where::Monitor(_))
        {
            return Err(ImageRefused {
                path: show(path),
                reason: "another file has taken its place since the VM was started".to_owned(),
                advice: "give the VM's own image its name back: the VM still has it open"
                    .to_owned(),
            }
            .into());
        }
        let advice = "consolidate first: `strake disk consolidate`";
        if looks.files.len() >= MAX_LAYERS {
            let reason = format!("it has {} images below each other", looks.files.len());
            return Err(no_snapshots(disk, &reason, advice));
        }
        let mut files = OTHER_FILES + vm.nics.len() + 1;
        for disk in &vm.disks {
            let looks = chain::look(&disk.image, &allowed)?;
            files += looks.map_or(1, |looks| looks.files.len());
        }
        if files > MAX_FDS {
            let reason = format!("the VM would need {files} files, and {MAX_FDS} can be given");
            return Err(no_snapshots(disk, &reason, advice));
        }
        match place {
            Where::Monitor(monitor) => running_size(monitor, &disk.name),
            Where::Here => Ok(looks.size),
        }
    }

    /// A job, once it has ended or has taken longer than a snapshot does.
    fn ended_soon(&self, id: &JobId) -> Result<Job> {
        let deadline = Instant::now() + SNAPSHOT_PATIENCE;
        while self.inventory.job(id)?.state != JobState::Ended && Instant::now() < deadline {
            std::thread::sleep(LOOK);
        }
        self.job(id)
    }
}

/// A job from a disk's image to another one.
fn layer_job(
    vm: &VmRecord,
    disk: &DiskRecord,
    destination: &Path,
    to: String,
    limits: &MigrationLimits,
) -> NewJob {
    NewJob {
        vm: vm.name.clone(),
        disk: disk.name.clone(),
        size: disk.size,
        source: disk.image.clone(),
        destination: Binding::new(destination, strake_api::image::ImageFormat::Qcow2),
        to,
        kind: JobKind::Snapshot,
        snapshot: None,
        layer: None,
        limits: limits.clone(),
        remove_source: false,
        source_file: disk.file.clone(),
    }
}

fn refused(doing: &str, vm: &str, disk: &str) -> impl FnOnce() -> SnapshotRefused {
    let [doing, vm, disk] = [doing, vm, disk].map(str::to_owned);
    move || SnapshotRefused { doing, vm, disk }
}

fn named<'a>(disk: &'a DiskRecord, snapshot: &str) -> Result<&'a LayerRecord> {
    let names = || {
        let names: Vec<&str> = disk
            .layers
            .iter()
            .filter_map(|layer| layer.name.as_deref())
            .collect();
        match names.as_slice() {
            [] => "none".to_owned(),
            names => names.join(", "),
        }
    };
    disk.layers
        .iter()
        .find(|layer| layer.name.as_deref() == Some(snapshot))
        .ok_or_else(|| {
            NoSuchSnapshot {
                disk: disk.name.clone(),
                snapshot: snapshot.to_owned(),
                has: names(),
            }
            .into()
        })
}

/// The name of a new snapshot.
fn snapshot_name(disk: &DiskRecord, asked: Option<&str>) -> Result<String> {
    let taken = |name: &str| {
        let mut layers = disk.layers.iter();
        layers.any(|layer| layer.name.as_deref() == Some(name))
    };
    let Some(name) = asked else {
        let mut number = 1_u64;
        while taken(&format!("snapshot-{number}")) {
            number += 1;
        }
        return Ok(format!("snapshot-{number}"));
    };
    check_name(name, MAX_NAME).map_err(|reason| BadName {
        what: "snapshot".to_owned(),
        name: name.to_owned(),
        reason,
    })?;
    if taken(name) {
        return Err(SnapshotExists {
            disk: disk.name.clone(),
            snapshot: name.to_owned(),
        }
        .into());
    }
    Ok(name.to_owned())
}

/// A file's name without what tells its format, and without the number of an overlay.
fn stem(name: &str) -> &str {
    let stem = [".raw", ".img", ".qcow2"]
        .iter()
        .find_map(|end| name.strip_suffix(end))
        .unwrap_or(name);
    match stem.rsplit_once('.') {
        Some((before, number))
            if !before.is_empty() && number.parse::<u32>().is_ok() && stem != name =>
        {
            before
        }
        _ => stem,
    }
}

fn missing(location: &Location) -> Observation {
    ImageRefused {
        path: location.to_string(),
        reason: "there is no such file".to_owned(),
        advice: "restore it".to_owned(),
    }
    .into()
}

fn no_snapshots(disk: &DiskRecord, reason: &str, advice: &str) -> Observation {
    NoSnapshots {
        disk: disk.name.clone(),
        reason: reason.to_owned(),
        advice: advice.to_owned(),
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::stem;

    #[test]
    fn overlays_are_called_after_the_first_image() {
        for (name, expected) in [
            ("root.raw", "root"),
            ("root.qcow2", "root"),
            ("root.12.qcow2", "root"),
            ("web.example.img", "web.example"),
            ("debian.12", "debian.12"),
            ("lv0", "lv0"),
            (".1.qcow2", ".1"),
        ] {
            assert_eq!(stem(name), expected, "{name}");
        }
    }
}
