//! The table itself. To add a field: its line here, and how to read and write it in `document.rs`.

use strake_profile::{ChangeClass, Constant, Field, Merge, ObjectKind, Steer, Unit, ValueKind};

use crate::spec::{MAX_CMDLINE, MAX_CPUS, MAX_DISK, MAX_MEMORY, MAX_PATH, MAX_QUEUES};
use crate::spec::{MAX_DEVICE_NAME, SECTOR};
use crate::spec::{MAX_IFNAME, MAX_LABEL_VALUE, MEMORY_STEP, MIN_BANDWIDTH, MIN_IOPS, MIN_MEMORY};

/// A VM.
pub const VM: &str = "vm";
/// A disk of a VM.
pub const DISK: &str = "disk";
/// A network interface of a VM.
pub const NIC: &str = "nic";

/// The kinds of objects.
pub const KINDS: &[ObjectKind] = &[
    ObjectKind {
        name: VM,
        part_of: None,
        contexts: &["host"],
        doc: "A virtual machine. Its labels are those of its spec.",
    },
    ObjectKind {
        name: DISK,
        part_of: Some(VM),
        contexts: &["host", "datastore"],
        doc: "A disk of a VM. It has the VM's labels; `match.datastore` looks at the labels of the \
              datastore that its image lies in.",
    },
    ObjectKind {
        name: NIC,
        part_of: Some(VM),
        contexts: &["host"],
        doc: "A network interface of a VM. It has the VM's labels.",
    },
];

const fn text(longest: usize) -> ValueKind {
    ValueKind::Text {
        longest,
        choices: &[],
    }
}

/// What most lines of the table say.
const USUAL: Field = Field {
    kind: VM,
    path: "",
    value: ValueKind::Bool,
    default: None,
    absent_is_unlimited: false,
    merge: Merge::Replace,
    change: ChangeClass::Reboot,
    steer: Steer::Profiles,
    doc: "",
};

/// Every field.
pub const FIELDS: &[Field] = &[
    Field {
        path: "labels",
        value: ValueKind::Map {
            longest: MAX_LABEL_VALUE,
        },
        change: ChangeClass::Live,
        steer: Steer::Own,
        doc: "Labels, `labels.KEY = \"VALUE\"`: what profiles select by. A change takes effect at \
              once, with everything that the profiles make of it.",
        ..USUAL
    },
    Field {
        path: "cpus",
        value: ValueKind::Int {
            unit: Unit::Count,
            min: 1,
            max: MAX_CPUS as u64,
            step: 1,
        },
        default: Some(Constant::Int(1)),
        doc: "How many vCPUs.",
        ..USUAL
    },
    Field {
        path: "memory",
        value: ValueKind::Int {
            unit: Unit::Bytes,
            min: MIN_MEMORY,
            max: MAX_MEMORY,
            step: MEMORY_STEP,
        },
        default: Some(Constant::Int(512 << 20)),
        doc: "The guest's RAM.",
        ..USUAL
    },
    Field {
        path: "console",
        value: ValueKind::Text {
            longest: 16,
            choices: &["serial", "virtio"],
        },
        default: Some(Constant::Text("serial")),
        change: ChangeClass::Restart,
        doc: "Which of the guest's two consoles attached terminals type into.",
        ..USUAL
    },
    Field {
        path: "boot.from",
        value: ValueKind::Text {
            longest: 16,
            choices: &["kernel", "disk"],
        },
        steer: Steer::Fixed,
        doc: "Whether the kernel is a file of the host or the one that a disk's boot entries name.",
        ..USUAL
    },
    Field {
        path: "boot.kernel",
        value: text(MAX_PATH),
        steer: Steer::Own,
        doc: "The kernel file, an absolute path (`boot.from = \"kernel\"`).",
        ..USUAL
    },
    Field {
        path: "boot.initrd",
        value: text(MAX_PATH),
        steer: Steer::Own,
        doc: "The initial RAM disk, an absolute path (`boot.from = \"kernel\"`).",
        ..USUAL
    },
    Field {
        path: "boot.disk",
        value: text(MAX_DEVICE_NAME),
        steer: Steer::Own,
        doc: "The disk to boot from (`boot.from = \"disk\"`); the first one if absent.",
        ..USUAL
    },
    Field {
        path: "boot.cmdline",
        value: text(MAX_CMDLINE),
        doc: "The kernel's command line; with `boot.from = \"disk\"`, what is appended to the disk's \
              own.",
        ..USUAL
    },
    Field {
        kind: DISK,
        path: "disk.name",
        value: text(MAX_DEVICE_NAME),
        steer: Steer::Fixed,
        doc: "The disk's name, which the guest sees as its serial number.",
        ..USUAL
    },
    Field {
        kind: DISK,
        path: "disk.image",
        value: text(MAX_PATH),
        steer: Steer::Fixed,
        doc: "`DATASTORE:FILE` or an absolute path. `strake disk migrate` moves it.",
        ..USUAL
    },
    Field {
        kind: DISK,
        path: "disk.format",
        value: ValueKind::Text {
            longest: 16,
            choices: &["raw", "qcow2"],
        },
        steer: Steer::Fixed,
        doc: "The image's format; if absent, the end of its name tells.",
        ..USUAL
    },
    Field {
        kind: DISK,
        path: "disk.size",
        value: ValueKind::Int {
            unit: Unit::Bytes,
            min: SECTOR,
            max: MAX_DISK,
            step: SECTOR,
        },
        steer: Steer::Fixed,
        doc: "How large an image is created if there is none.",
        ..USUAL
    },
    Field {
        kind: DISK,
        path: "disk.read-only",
        value: ValueKind::Bool,
        steer: Steer::Fixed,
        doc: "Whether the guest may only read.",
        ..USUAL
    },
    Field {
        kind: DISK,
        path: "disk.queues",
        value: ValueKind::Int {
            unit: Unit::Count,
            min: 1,
            max: MAX_QUEUES as u64,
            step: 1,
        },
        doc: "How many virtqueues; one for each vCPU if absent.",
        ..USUAL
    },
    Field {
        kind: DISK,
        path: "disk.iops",
        value: ValueKind::Int {
            unit: Unit::PerSecond,
            min: MIN_IOPS,
            max: 1 << 32,
            step: 1,
        },
        absent_is_unlimited: true,
        change: ChangeClass::Live,
        doc: "The most requests per second that the guest gets out of the disk, reads and changes \
              together; without limit if absent.",
        ..USUAL
    },
    Field {
        kind: DISK,
        path: "disk.bandwidth",
        value: ValueKind::Int {
            unit: Unit::BytesPerSecond,
            min: MIN_BANDWIDTH,
            max: 1 << 48,
            step: 1,
        },
        absent_is_unlimited: true,
        change: ChangeClass::Live,
        doc: "The most bytes per second that the guest reads and writes; without limit if absent.",
        ..USUAL
    },
    Field {
        kind: NIC,
        path: "nic.name",
        value: text(MAX_DEVICE_NAME),
        steer: Steer::Fixed,
        doc: "The interface's name within the VM.",
        ..USUAL
    },
    Field {
        kind: NIC,
        path: "nic.tap",
        value: text(MAX_IFNAME),
        steer: Steer::Fixed,
        doc: "The tap device on the host; made and recorded if absent.",
        ..USUAL
    },
    Field {
        kind: NIC,
        path: "nic.bridge",
        value: text(MAX_IFNAME),
        doc: "The bridge of the host that the tap joins.",
        ..USUAL
    },
    Field {
        kind: NIC,
        path: "nic.mac",
        value: text(17),
        steer: Steer::Fixed,
        doc: "The interface's address; made and recorded if absent.",
        ..USUAL
    },
];
