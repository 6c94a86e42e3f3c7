//! The VM spec: what an operator writes about a VM, in TOML.
//!
//! ```toml
//! cpus = 2                         # without it, as profiles say, or 1
//! memory = "1G"                    # without it, as profiles say, or 512M
//! console = "serial"               # or "virtio"; serial if absent
//!
//! [boot]
//! from = "kernel"
//! kernel = "/boot/vmlinuz-6.1.0-cloud-amd64"
//! initrd = "/boot/initrd.img-6.1.0-cloud-amd64"
//! cmdline = "root=/dev/vda1 console=ttyS0"
//!
//! [[disk]]
//! name = "root"
//! image = "fast:web1-root.raw"     # DATASTORE:FILE, or an absolute path
//! format = "raw"                   # or "qcow2"; absent: qcow2 if the file's name ends in .qcow2
//!
//! [[nic]]
//! name = "net0"
//! tap = "tap-web1"
//! ```

//!
//! The same rules hold on every way in: [`VmSpec::from_toml`] for a file (each problem with its
//! line and column) and [`VmSpec::validate`] for what came as JSON.

mod bytes;
mod check;
mod name;
mod read;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::image::ImageFormat;

pub use bytes::Bytes;
pub use check::{
    MAX_CMDLINE, MAX_CPUS, MAX_DEVICES, MAX_DISK, MAX_IFNAME, MAX_LABEL_VALUE, MAX_MEMORY,
    MAX_QUEUES, MEMORY_STEP, MIN_BANDWIDTH, MIN_IOPS, MIN_MEMORY, SECTOR,
};
pub use name::{
    ImageRef, MAX_DEVICE_NAME, MAX_FILE_NAME, MAX_NAME, MAX_PATH, check_name, parse_mac,
};
pub use read::MAX_SPEC_TEXT;
#[cfg(test)]
pub(crate) use read::known_keys;

/// A VM, as its operator describes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// Labels, for profiles and for the operator's own order.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// How many vCPUs, 1 to 16; 0 if it is left to profiles and the default.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub cpus: u8,
    /// The guest's RAM: `512M`, `1G`, or bytes; 0 if it is left to profiles and the default.
    #[serde(default, skip_serializing_if = "Bytes::is_zero")]
    pub memory: Bytes,
    /// Which of the guest's consoles terminals type into; the serial one if nobody says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub console: Option<ConsoleKind>,
    /// What to boot.
    pub boot: BootSpec,
    /// Disks, in the guest's order.
    #[serde(default, rename = "disk")]
    pub disks: Vec<DiskSpec>,
    /// Network interfaces, in the guest's order.
    #[serde(default, rename = "nic")]
    pub nics: Vec<NicSpec>,
}

/// Which of the guest's consoles the input of attached terminals goes to. Every guest has both, and
/// what it writes to either is on the terminals and in the log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConsoleKind {
    /// The serial port, `ttyS0` in Linux: works from the first line of the boot on.
    #[default]
    Serial,
    /// virtio-console, `hvc0` in Linux: a fraction of the serial port's cost for each byte.
    Virtio,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as serde calls it
fn is_zero(n: &u8) -> bool {
    *n == 0
}

/// What to boot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "from", rename_all = "kebab-case", deny_unknown_fields)]
pub enum BootSpec {
    /// A kernel file of the host.
    Kernel {
        /// bzImage, or ELF with a PVH note; an absolute path.
        kernel: String,
        /// Initial RAM disk; an absolute path.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        initrd: Option<String>,
        /// Kernel command line.
        #[serde(default)]
        cmdline: String,
    },
    /// The kernel that a disk image of the VM names in its own boot entries.
    Disk {
        /// Which disk; the first one if absent.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        disk: Option<String>,
        /// Appended to the image's own command line.
        #[serde(default)]
        cmdline: String,
    },
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Its name within the VM.
    pub name: String,
    /// Its image: `DATASTORE:FILE`, or an absolute path to a file or block device. The
    /// inventory's binding overrides it once the disk has been migrated.
    pub image: String,
    /// The image's format. If absent, the end of its name tells: `.qcow2` is qcow2, all else is
    /// raw. The content is never looked at for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<ImageFormat>,
    /// If the image does not exist, an empty one of this size is created with the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Bytes>,
    /// Whether the guest may not write.
    #[serde(default, rename = "read-only")]
    pub read_only: bool,
    /// How many virtqueues; one for each vCPU if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queues: Option<u16>,
    /// The most requests per second; without limit if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub iops: Option<u64>,
    /// The most bytes per second; without limit if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<Bytes>,
}

impl DiskSpec {
    /// The format of its image.
    #[must_use]
    pub fn format(&self) -> ImageFormat {
        self.format
            .unwrap_or_else(|| ImageFormat::of_name(&self.image))
    }
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicSpec {
    /// Its name within the VM.
    pub name: String,
    /// The tap device on the host; created if it does not exist, `strake-VM-N` style if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// A bridge of the host that the tap joins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// Its MAC address; a locally administered one is made and recorded if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}
