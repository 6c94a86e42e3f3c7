//! What crosses between processes comes through whole, and the largest of it fits.

use crate::control::{
    Body, BootConfig, ConsoleKind, DiskConfig, Event, ExitReason, FdIndex, ImageConfig,
    ImageFormat, LayerAccess, LayerConfig, MAX_FDS, MAX_PACKET, MachineConfig, MemoryConfig,
    NicConfig, Packet, Reply, Request, RunState, VmStatus,
};
use crate::job::{
    Ceiling, JobId, Kept, Latency, LatencySeen, LimitsChange, MigrationLimits, MigrationStatus,
    PassReport, Phase, Progress,
};
use crate::spec::{MAX_CMDLINE, MAX_DEVICE_NAME, MAX_DEVICES, MAX_NAME, MAX_PATH};

fn status(passes: u32) -> MigrationStatus {
    MigrationStatus {
        job: JobId("job-1".into()),
        disk: "root".into(),
        phase: Phase::Copying,
        size_bytes: u64::MAX,
        passes: (0..passes)
            .map(|number| PassReport {
                number,
                planned_bytes: u64::MAX,
                read_bytes: u64::MAX,
                written_bytes: u64::MAX,
                elapsed_ms: u64::MAX,
                dirty_after_bytes: u64::MAX,
            })
            .collect(),
        throughput: u64::MAX,
        expected_pause_ms: Some(0.1),
        pause_ms: None,
        elapsed_ms: 1,
        method: None,
        progress: Progress::Paused,
        latency: Some(Box::new(LatencySeen {
            now_us: u64::MAX,
            before_us: u64::MAX,
            target_us: Some(u64::MAX),
        })),
        kept: Some(Box::new(Kept { bytes: u64::MAX })),
        overlay: None,
        failure: None,
    }
}

fn largest_machine() -> MachineConfig {
    // Every byte of these has to be escaped.
    let path = "\"".repeat(MAX_PATH);
    let device = "d".repeat(MAX_DEVICE_NAME);
    MachineConfig {
        vm: "v".repeat(MAX_NAME),
        cpus: 16,
        kvm: FdIndex(0),
        memory: MemoryConfig {
            size: u64::MAX,
            memfd: FdIndex(1),
        },
        boot: BootConfig::Kernel {
            kernel: FdIndex(2),
            kernel_path: path.clone(),
            initrd: Some(FdIndex(3)),
            cmdline: "\"".repeat(MAX_CMDLINE),
        },
        disks: vec![
            DiskConfig {
                name: device.clone(),
                slot: 31,
                image: ImageConfig::Raw {
                    file: FdIndex(4),
                    path,
                },
                read_only: false,
                serial: device.clone(),
                limits: crate::control::DiskLimits::default(),
                queues: 16,
            };
            MAX_DEVICES
        ],
        nics: vec![
            NicConfig {
                name: device,
                slot: 31,
                tap: FdIndex(5),
                mac: [255; 6],
            };
            MAX_DEVICES
        ],
        console: ConsoleKind::Virtio,
        console_log: FdIndex(6),
        observations: Some(FdIndex(7)),
    }
}

#[test]
fn the_largest_machine_fits_into_a_packet() {
    let body = Body::Request(Request::Configure(Box::new(largest_machine())));
    let wire = serde_json::to_vec(&Packet { id: u64::MAX, body }).unwrap();
    assert!(wire.len() <= MAX_PACKET, "{}", wire.len());
    // kvm, memory, kernel, initrd, console log, and one for each device.
    const { assert!(MAX_DEVICES + 5 <= MAX_FDS) };
}

#[test]
fn a_long_job_fits_into_a_packet() {
    let passes = MigrationLimits::default().max_passes + 1;
    let body = Body::Event(Event::JobEnded(status(passes)));
    let wire = serde_json::to_vec(&Packet { id: 0, body }).unwrap();
    assert!(wire.len() <= MAX_PACKET / 4, "{}", wire.len());
}

#[test]
fn packets_come_through_whole() {
    let failure = || crate::SpecInvalid {
        key: "cpus".into(),
        reason: "0 vCPUs".into(),
        advice: "more".into(),
    };
    let job = || JobId("job-1".into());
    let bodies = [
        Body::Request(Request::Hello { version: 1 }),
        Body::Request(Request::Configure(Box::new(largest_machine()))),
        Body::Request(Request::Start),
        Body::Request(Request::MigrateDisk {
            job: job(),
            disk: "root".into(),
            destination: ImageConfig::Qcow2 {
                layers: vec![LayerConfig {
                    file: FdIndex(0),
                    path: "/x".into(),
                    format: ImageFormat::Qcow2,
                    access: LayerAccess::ReadWrite,
                }],
            },
            journal: FdIndex(1),
            limits: MigrationLimits::default(),
            keep: None,
        }),
        Body::Request(Request::JobDecision {
            job: job(),
            committed: true,
        }),
        Body::Reply(Reply::Done),
        Body::Reply(Reply::Failed(failure().into())),
        Body::Reply(Reply::Status(VmStatus {
            state: RunState::Exited(ExitReason::Failed(failure().into())),
            uptime_ms: 1,
            disks: Vec::new(),
            jobs: vec![status(2)],
        })),
        Body::Event(Event::JobAwaitsCommit { job: job() }),
        Body::Event(Event::Observed(failure().into())),
    ];
    for body in bodies {
        let packet = Packet { id: 7, body };
        let wire = serde_json::to_string(&packet).unwrap();
        assert_eq!(serde_json::from_str::<Packet>(&wire).unwrap(), packet);
    }
}

#[test]
fn absent_limits_are_the_defaults_and_unknown_ones_are_refused() {
    let read = |text: &str| serde_json::from_str::<crate::rest::MigrateDisk>(text);
    let request = read("{\"to\": \"fast\"}").unwrap();
    assert_eq!(request.limits, MigrationLimits::default());
    assert!(!request.remove_source);
    let request = read("{\"to\": \"fast\", \"limits\": {\"pause_ms\": 5}}").unwrap();
    assert_eq!(request.limits.pause_ms, 5);
    assert!(read("{\"to\": \"fast\", \"limits\": {\"pause\": 5}}").is_err());
    assert!(read("{\"to\": \"fast\", \"force\": true}").is_err());
}

#[test]
fn a_change_of_limits_changes_what_it_names() {
    let mut limits = MigrationLimits {
        bytes_per_second: Some(1 << 20),
        iops: Some(100),
        ..MigrationLimits::default()
    };
    let change: LimitsChange = serde_json::from_str(
        r#"{"bytes_per_second": "unlimited", "iops": {"at": 7}, "latency": {"us": 1500}}"#,
    )
    .unwrap();
    assert_eq!(change.iops, Some(Ceiling::At(7)));
    change.apply(&mut limits);
    let expected = MigrationLimits {
        iops: Some(7),
        latency: Latency::Us(1500),
        ..MigrationLimits::default()
    };
    assert_eq!(limits, expected);
    LimitsChange::default().apply(&mut limits);
    assert_eq!(limits, expected);
    // A monitor from before there were these limits still takes the usual ones.
    let usual = serde_json::to_value(MigrationLimits::default()).unwrap();
    assert!(
        usual.get("iops").is_none() && usual.get("latency").is_none(),
        "{usual}"
    );
}
