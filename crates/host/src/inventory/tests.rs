//! The inventory's promises, against a real database.

use std::path::Path;

use strake_api::image::ImageFormat;
use strake_api::job::{JobId, JobKind, MigrationLimits, Phase};
use strake_api::spec::VmSpec;

use super::*;
use crate::{Binding, FileIdentity};

fn spec() -> VmSpec {
    VmSpec::from_toml(
        "cpus = 1\nmemory = \"64M\"\nboot = { from = \"kernel\", kernel = \"/k\" }\n",
        "test",
    )
    .unwrap()
}

fn raw(path: &str) -> Binding {
    Binding::new(path, ImageFormat::Raw)
}

fn disk(image: &str, datastore: Option<&str>) -> DiskRecord {
    DiskRecord {
        name: "root".into(),
        slot: 4,
        image: raw(image),
        datastore: datastore.map(str::to_owned),
        size: 4096,
        read_only: false,
        created: true,
        file: None,
        below: Vec::new(),
        parent: None,
        layers: Vec::new(),
    }
}

fn nic() -> NicRecord {
    NicRecord {
        name: "net0".into(),
        slot: 5,
        tap: "tap0".into(),
        bridge: None,
        mac: "52:54:00:00:00:01".into(),
    }
}

fn new_job() -> NewJob {
    NewJob {
        vm: "web1".into(),
        disk: "root".into(),
        size: 4096,
        source: raw("/slow/root.raw"),
        destination: raw("/fast/root.raw"),
        to: "fast".into(),
        kind: JobKind::Migrate,
        snapshot: None,
        layer: None,
        limits: MigrationLimits::default(),
        remove_source: true,
        source_file: Some(file(1)),
    }
}

fn file(ino: u64) -> FileIdentity {
    FileIdentity {
        dev: 1,
        boot: "this".into(),
        ino,
        born_ns: Some(ino),
    }
}

fn files() -> JobFiles {
    JobFiles {
        destination: file(2),
        journal: Some(file(3)),
        kept: Some(file(4)),
    }
}

fn why() -> Observation {
    crate::observations::NoSuchVm { vm: "x".into() }.into()
}

fn with_vm(path: &Path) -> Inventory {
    let inventory = Inventory::open(path).unwrap();
    inventory.add_datastore("slow", "/slow").unwrap();
    inventory.add_datastore("fast", "/fast").unwrap();
    let disks = [disk("/slow/root.raw", Some("slow"))];
    inventory.add_vm("web1", &spec(), &disks, &[nic()]).unwrap();
    inventory
}

#[test]
fn records_survive_a_new_daemon() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("inventory.sqlite");
    let inventory = with_vm(&path);
    inventory.vm_running("web1", (77, 123_456), 99).unwrap();
    drop(inventory);
    let vm = Inventory::open(&path).unwrap().vm("web1").unwrap();
    assert_eq!(vm.state, StoredState::Running);
    assert_eq!(vm.process, Some((77, 123_456)));
    assert_eq!(vm.what, Workload::Vm(spec()));
    assert_eq!(vm.disks, [disk("/slow/root.raw", Some("slow"))]);
    assert_eq!(vm.nics, [nic()]);
    assert_eq!(vm.revision, 2);
}

#[test]
fn a_newer_schema_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("inventory.sqlite");
    rusqlite::Connection::open(&path)
        .unwrap()
        .execute_batch("PRAGMA user_version = 99")
        .unwrap();
    let seen = Inventory::open(&path).unwrap_err();
    assert_eq!(seen.id(), "host.inventory-too-new");
}

#[test]
fn an_older_schema_is_brought_up_to_date() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("inventory.sqlite");
    let old = rusqlite::Connection::open(&path).unwrap();
    old.execute_batch(super::schema::STEPS[0]).unwrap();
    let spec = serde_json::to_string(&spec()).unwrap();
    let status = r#"{"job":"job-1","disk":"root","phase":"copying","size_bytes":4096,"passes":[],
        "throughput":0,"expected_pause_ms":null,"pause_ms":null,"elapsed_ms":0}"#;
    old.execute_batch(&format!(
        "PRAGMA user_version = 1;
         INSERT INTO datastores VALUES ('slow', '/slow');
         INSERT INTO vms VALUES ('web1', 1, '{spec}', 'running', NULL, 7, 8, 9);
         INSERT INTO disks VALUES ('web1', 'root', 0, 4, '/slow/root.raw', 'slow', 4096, 0, 1);
         INSERT INTO jobs VALUES (1, 'web1', 'root', '/slow/root.raw', '/fast/root.raw', 'fast',
             '{{}}', 1, 'running', 42, '{status}');"
    ))
    .unwrap();
    drop(old);
    let inventory = Inventory::open(&path).unwrap();
    let vm = inventory.vm("web1").unwrap();
    assert_eq!(vm.disks, [disk("/slow/root.raw", Some("slow"))]);
    let job = inventory.job(&JobId("job-1".into())).unwrap();
    // An inode's number is not enough to know a file by.
    assert_eq!((job.files, job.source_file), (None, None));
}

#[test]
fn something_that_is_no_database_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("inventory.sqlite");
    std::fs::write(&path, vec![7u8; 8192]).unwrap();
    let seen = Inventory::open(&path).unwrap_err();
    assert_eq!(seen.id(), "host.inventory-failed");
    assert!(seen.text().contains("inventory.sqlite"));
}

#[test]
fn names_taps_and_addresses_are_taken_once() {
    let dir = tempfile::tempdir().unwrap();
    let inventory = with_vm(&dir.path().join("i"));
    let add = |name: &str, nic: NicRecord| {
        inventory
            .add_vm(name, &spec(), &[], &[nic])
            .unwrap_err()
            .id()
            .to_owned()
    };
    assert_eq!(add("web1", nic()), "host.vm-exists");
    assert_eq!(add("web2", nic()), "host.nic-conflict");
    let other_tap = NicRecord {
        tap: "tap1".into(),
        ..nic()
    };
    assert_eq!(add("web2", other_tap), "host.nic-conflict");
    // Nothing of the refused VM is left.
    assert_eq!(inventory.vm("web2").unwrap_err().id(), "host.no-such-vm");
    assert_eq!(
        inventory.add_datastore("fast", "/x").unwrap_err().id(),
        "host.datastore-exists"
    );
    assert_eq!(
        inventory.add_datastore("x", "/fast").unwrap_err().id(),
        "host.datastore-exists"
    );
}

#[test]
fn a_used_datastore_stays() {
    let dir = tempfile::tempdir().unwrap();
    let inventory = with_vm(&dir.path().join("i"));
    let seen = inventory.remove_datastore("slow").unwrap_err();
    assert!(seen.text().contains("disk 'root' of VM 'web1'"), "{seen}");
    let job = inventory.reserve_job(&new_job()).unwrap();
    let seen = inventory.remove_datastore("fast").unwrap_err();
    assert!(seen.text().contains("job-1"), "{seen}");
    inventory.drop_job(&job.id).unwrap();
    inventory.remove_datastore("fast").unwrap();
    inventory.remove_vm("web1").unwrap();
    inventory.remove_datastore("slow").unwrap();
    assert!(inventory.datastores().unwrap().is_empty());
}

#[test]
fn the_commit_moves_binding_and_job_together() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i");
    let inventory = with_vm(&path);
    let job = inventory.reserve_job(&new_job()).unwrap();
    assert_eq!(job.state, JobState::Preparing);
    assert_eq!(
        inventory.reserve_job(&new_job()).unwrap_err().id(),
        "host.disk-busy"
    );
    // Not before the destination is the job's.
    assert!(inventory.commit_job(&job.id).is_err());
    inventory.job_running(&job.id, &files()).unwrap();
    inventory.commit_job(&job.id).unwrap();
    drop(inventory);
    let inventory = Inventory::open(&path).unwrap();
    let disk = &inventory.vm("web1").unwrap().disks[0];
    assert_eq!(disk.image, raw("/fast/root.raw"));
    assert_eq!(disk.datastore.as_deref(), Some("fast"));
    let mut job = inventory.job(&job.id).unwrap();
    assert_eq!((job.state, job.files), (JobState::Committed, Some(files())));
    // A committed job can neither be committed again nor be undone nor be forgotten.
    assert!(inventory.commit_job(&job.id).is_err());
    assert!(inventory.abort_job(&job.id, Some(&why())).is_err());
    inventory.drop_job(&job.id).unwrap();
    assert_eq!(inventory.active_jobs("web1").unwrap().len(), 1);
    job.status.phase = Phase::Completed;
    inventory.end_job(&job.id, &job.status).unwrap();
    assert!(inventory.active_jobs("web1").unwrap().is_empty());
    assert_eq!(
        inventory.job(&job.id).unwrap().status.phase,
        Phase::Completed
    );
}

#[test]
fn a_binding_is_a_location_and_a_format() {
    let dir = tempfile::tempdir().unwrap();
    let inventory = with_vm(&dir.path().join("i"));
    let to_qcow2 = NewJob {
        destination: Binding::new("/fast/root.qcow2", ImageFormat::Qcow2),
        ..new_job()
    };
    let job = inventory.reserve_job(&to_qcow2).unwrap();
    assert_eq!(
        (&job.source, &job.destination),
        (&to_qcow2.source, &to_qcow2.destination)
    );
    inventory.job_running(&job.id, &files()).unwrap();
    inventory.commit_job(&job.id).unwrap();
    assert_eq!(
        inventory.vm("web1").unwrap().disks[0].image,
        to_qcow2.destination
    );
}

fn run(inventory: &Inventory, new: &NewJob) -> DiskRecord {
    let job = inventory.reserve_job(new).unwrap();
    inventory.job_running(&job.id, &files()).unwrap();
    inventory.commit_job(&job.id).unwrap();
    inventory.end_job(&job.id, &job.status).unwrap();
    inventory.vm("web1").unwrap().disks.remove(0)
}

fn snapshot(name: &str, from: &Binding, to: &str) -> NewJob {
    NewJob {
        kind: JobKind::Snapshot,
        snapshot: Some(name.into()),
        source: from.clone(),
        destination: Binding::new(to, ImageFormat::Qcow2),
        to: "slow".into(),
        remove_source: false,
        ..new_job()
    }
}

#[test]
fn snapshots_make_a_tree_and_a_consolidation_takes_a_layer_away() {
    let dir = tempfile::tempdir().unwrap();
    let inventory = with_vm(&dir.path().join("i"));
    let base = raw("/slow/root.raw");
    let one = run(&inventory, &snapshot("one", &base, "/slow/root.1.qcow2"));
    assert_eq!(one.layers.len(), 1);
    assert_eq!(
        (one.layers[0].name.as_deref(), &one.layers[0].image),
        (Some("one"), &base)
    );
    assert_eq!(one.parent, Some(one.layers[0].id));
    assert_eq!(one.below, [Path::new("/slow/root.raw")]);
    // The same name twice is refused, and then nothing has changed.
    let again = inventory
        .reserve_job(&snapshot("one", &one.image, "/slow/root.2.qcow2"))
        .unwrap();
    inventory.job_running(&again.id, &files()).unwrap();
    assert!(inventory.commit_job(&again.id).is_err());
    inventory.drop_job(&again.id).unwrap();
    let two = run(
        &inventory,
        &snapshot("two", &one.image, "/slow/root.2.qcow2"),
    );
    assert_eq!(two.layers[1].parent, Some(two.layers[0].id));
    let below = [Path::new("/slow/root.1.qcow2"), Path::new("/slow/root.raw")];
    assert_eq!(two.below, below);
    // Back to the first: a branch.
    let back = NewJob {
        kind: JobKind::Revert,
        layer: Some(two.layers[0].id),
        ..snapshot("one", &two.image, "/slow/root.3.qcow2")
    };
    let back = run(&inventory, &back);
    assert_eq!(
        (back.parent, back.layers.len()),
        (Some(two.layers[0].id), 2)
    );
    // A layer that is a snapshot, or that two are based on, is not written.
    let merge = NewJob {
        kind: JobKind::Consolidate,
        layer: back.parent,
        snapshot: None,
        destination: base.clone(),
        ..snapshot("", &back.image, "/slow/x")
    };
    assert!(inventory.reserve_job(&merge).is_err());
    inventory.forget_snapshot("web1", "root", "one").unwrap();
    let seen = inventory
        .forget_snapshot("web1", "root", "one")
        .unwrap_err();
    assert_eq!(seen.id(), "host.no-such-snapshot");
    assert!(seen.text().contains("two"), "{seen}");
    assert!(inventory.reserve_job(&merge).is_err());
    assert!(inventory.forget_layer(back.layers[0].id).is_err());
    inventory.forget_snapshot("web1", "root", "two").unwrap();
    inventory.forget_layer(back.layers[1].id).unwrap();
    let merged = run(&inventory, &merge);
    assert_eq!((&merged.image, merged.parent), (&base, None));
    assert!(merged.layers.is_empty() && merged.created && merged.below.is_empty());
    assert_eq!(back.below, [Path::new("/slow/root.raw")]);
}

#[test]
fn what_a_migration_leaves_of_a_chain_stays_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let inventory = with_vm(&dir.path().join("i"));
    let one = run(
        &inventory,
        &snapshot("one", &raw("/slow/root.raw"), "/slow/root.1.qcow2"),
    );
    let moved = NewJob {
        source: one.image.clone(),
        remove_source: false,
        ..new_job()
    };
    let moved = run(&inventory, &moved);
    assert_eq!((&moved.image, moved.parent), (&raw("/fast/root.raw"), None));
    let names: Vec<_> = moved
        .layers
        .iter()
        .map(|layer| layer.name.as_deref())
        .collect();
    assert_eq!(names, [Some("one"), Some("before-job-2")]);
    assert_eq!(moved.layers[1].image, one.image);
    inventory.remove_vm("web1").unwrap();
    assert!(inventory.layers_at(&one.image.location).unwrap().is_empty());
}

#[test]
fn an_aborted_job_never_commits() {
    let dir = tempfile::tempdir().unwrap();
    let inventory = with_vm(&dir.path().join("i"));
    let job = inventory.reserve_job(&new_job()).unwrap();
    inventory.job_running(&job.id, &files()).unwrap();
    inventory.abort_job(&job.id, Some(&why())).unwrap();
    inventory.abort_job(&job.id, Some(&why())).unwrap();
    let kept = inventory.job(&job.id).unwrap().status.failure;
    assert_eq!(kept.unwrap().id(), "host.no-such-vm");
    let seen = inventory.commit_job(&job.id).unwrap_err();
    assert_eq!(seen.id(), "host.commit-failed");
    let disk = &inventory.vm("web1").unwrap().disks[0];
    assert_eq!(disk.image, raw("/slow/root.raw"));
}

#[test]
fn a_commit_whose_disk_moved_meanwhile_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let inventory = with_vm(&dir.path().join("i"));
    let elsewhere = NewJob {
        source: raw("/elsewhere.raw"),
        ..new_job()
    };
    let seen = inventory.reserve_job(&elsewhere).unwrap_err();
    assert_eq!(seen.id(), "host.inventory-corrupt");
    assert!(inventory.jobs().unwrap().is_empty());
    let job = inventory.reserve_job(&new_job()).unwrap();
    inventory.job_running(&job.id, &files()).unwrap();
    inventory
        .write("move a disk", |tx| {
            tx.execute("UPDATE disks SET image = '/elsewhere.raw'", [])?;
            Ok(())
        })
        .unwrap();
    assert!(inventory.commit_job(&job.id).is_err());
    assert_eq!(inventory.job(&job.id).unwrap().state, JobState::Running);
}

#[test]
fn destinations_in_use_are_refused_and_names_are_not_reused() {
    let dir = tempfile::tempdir().unwrap();
    let inventory = with_vm(&dir.path().join("i"));
    let to_bound = NewJob {
        destination: raw("/slow/root.raw"),
        ..new_job()
    };
    let seen = inventory.reserve_job(&to_bound).unwrap_err();
    assert_eq!(seen.id(), "host.destination-exists");
    assert!(seen.text().contains("VM 'web1'"), "{seen}");
    let first = inventory.reserve_job(&new_job()).unwrap();
    let other_disk = NewJob {
        disk: "data".into(),
        ..new_job()
    };
    let seen = inventory.reserve_job(&other_disk).unwrap_err();
    assert!(seen.text().contains("job-1"), "{seen}");
    inventory.drop_job(&first.id).unwrap();
    let second = inventory.reserve_job(&new_job()).unwrap();
    assert_eq!(second.id, JobId("job-2".into()));
    assert_eq!(
        inventory.job(&first.id).unwrap_err().id(),
        "host.no-such-job"
    );
    for odd in ["", "job-", "job-x", "job--1", "x"] {
        assert!(inventory.job(&JobId(odd.into())).is_err());
    }
}

#[test]
fn what_is_read_is_in_the_database_and_not_only_in_its_log() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i");
    let inventory = with_vm(&path);
    let job = inventory.reserve_job(&new_job()).unwrap();
    inventory.job_running(&job.id, &files()).unwrap();
    inventory.commit_job(&job.id).unwrap();
    // What a daemon leaves that is killed: the log stays as it is.
    let killed = dir.path().join("k");
    std::fs::copy(&path, &killed).unwrap();
    std::fs::copy(dir.path().join("i-wal"), dir.path().join("k-wal")).unwrap();
    drop(inventory);
    let next = Inventory::open(&killed).unwrap();
    let alone = dir.path().join("alone");
    std::fs::copy(&killed, &alone).unwrap();
    drop(next);
    let alone = Inventory::open(&alone).unwrap();
    assert_eq!(alone.job(&job.id).unwrap().state, JobState::Committed);
    let disk = &alone.vm("web1").unwrap().disks[0];
    assert_eq!(disk.image, raw("/fast/root.raw"));
}

#[test]
fn an_inventory_that_cannot_be_made_durable_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("i");
    let inventory = with_vm(&path);
    let reader = rusqlite::Connection::open(&path).unwrap();
    reader
        .execute_batch("BEGIN; SELECT count(*) FROM vms;")
        .unwrap();
    inventory.vm_running("web1", (7, 8), 9).unwrap();
    let seen = Inventory::open(&path).unwrap_err();
    assert_eq!(seen.id(), "host.inventory-failed");
    drop(reader);
    Inventory::open(&path).unwrap();
}

#[test]
fn the_identity_of_a_new_image_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let inventory = Inventory::open(&dir.path().join("i")).unwrap();
    let made = DiskRecord {
        file: Some(file(1)),
        ..disk("/x/root.raw", None)
    };
    let disks = [made];
    inventory.add_vm("web1", &spec(), &disks, &[]).unwrap();
    assert_eq!(inventory.vm("web1").unwrap().disks, disks);
}
