//! A VM's spec as a document of fields.

use strake_profile::{Steer, Value};

use super::{DISK, NIC, VM, schema};
use crate::spec::{BootSpec, Bytes, ConsoleKind, DiskSpec, NicSpec, VmSpec};

/// An object that a VM's spec describes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The VM.
    Vm,
    /// One of its disks, by name.
    Disk(String),
    /// One of its interfaces, by name.
    Nic(String),
}

impl Part {
    /// Its kind in the schema.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Vm => VM,
            Self::Disk(_) => DISK,
            Self::Nic(_) => NIC,
        }
    }

    /// What people know it by: `web1`, `web1/root`.
    #[must_use]
    pub fn id(&self, vm: &str) -> String {
        match self {
            Self::Vm => vm.to_owned(),
            Self::Disk(name) | Self::Nic(name) => format!("{vm}/{name}"),
        }
    }

    /// A field of it as `strake set` writes it: `cpus`, `disk.root.iops`.
    #[must_use]
    pub fn target(&self, path: &str) -> String {
        match self {
            Self::Vm => path.to_owned(),
            Self::Disk(name) | Self::Nic(name) => {
                let field = path.split_once('.').map_or(path, |(_, field)| field);
                format!("{}.{name}.{field}", self.kind())
            }
        }
    }
}

/// Reads what `strake set` writes about: `cpus`, `labels.team`, `disk.root.iops`.
///
/// # Errors
/// The reason, as the end of a sentence that begins with the text.
pub fn parse_target(spec: &VmSpec, text: &str) -> Result<(Part, String), String> {
    let disks = spec.disks.iter().map(|disk| Part::Disk(disk.name.clone()));
    let nics = spec.nics.iter().map(|nic| Part::Nic(nic.name.clone()));
    for part in disks.chain(nics) {
        let prefix = part.target("x.");
        if let Some(field) = text.strip_prefix(&prefix) {
            let path = format!("{}.{field}", part.kind());
            if schema().slot(&path).is_some() {
                return Ok((part, path));
            }
        }
    }
    let slot = schema()
        .slot(text)
        .and_then(|slot| schema().field(slot.field));
    match slot {
        Some(field) if field.kind == VM => Ok((Part::Vm, text.to_owned())),
        Some(field) => Err(format!(
            "names no {kind}; write {kind}.NAME.{}",
            field.path.split_once('.').map_or("", |(_, name)| name),
            kind = field.kind
        )),
        None => Err("is no field of this VM".to_owned()),
    }
}

fn text(value: &str) -> Option<Value> {
    (!value.is_empty()).then(|| Value::Text(value.to_owned()))
}

fn number(value: impl Into<u64>) -> Value {
    Value::Int(value.into())
}

impl VmSpec {
    /// The objects that it describes.
    #[must_use]
    pub fn parts(&self) -> Vec<Part> {
        let disks = self.disks.iter().map(|disk| Part::Disk(disk.name.clone()));
        let nics = self.nics.iter().map(|nic| Part::Nic(nic.name.clone()));
        std::iter::once(Part::Vm).chain(disks).chain(nics).collect()
    }

    /// What it says about one of its objects, by path.
    #[must_use]
    pub fn values(&self, part: &Part) -> Vec<(String, Value)> {
        let mut values = Vec::new();
        for field in schema().fields() {
            if field.kind != part.kind() {
                continue;
            }
            if field.path == "labels" {
                values.extend(
                    self.labels
                        .iter()
                        .map(|(key, value)| (format!("labels.{key}"), Value::Text(value.clone()))),
                );
            } else if let Some(value) = self.value(part, field.path) {
                values.push((field.path.to_owned(), value));
            }
        }
        values
    }

    /// One value of one of its objects; none if the spec does not say it.
    #[must_use]
    pub fn value(&self, part: &Part, path: &str) -> Option<Value> {
        match part {
            Part::Vm => self.vm_value(path),
            Part::Disk(name) => {
                let disk = self.disks.iter().find(|disk| disk.name == *name)?;
                disk_value(disk, path)
            }
            Part::Nic(name) => {
                let nic = self.nics.iter().find(|nic| nic.name == *name)?;
                nic_value(nic, path)
            }
        }
    }

    fn vm_value(&self, path: &str) -> Option<Value> {
        match (path, &self.boot) {
            ("cpus", _) => (self.cpus != 0).then(|| number(self.cpus)),
            ("memory", _) => (self.memory.0 != 0).then(|| number(self.memory.0)),
            ("console", _) => match self.console? {
                ConsoleKind::Serial => text("serial"),
                ConsoleKind::Virtio => text("virtio"),
            },
            ("boot.from", BootSpec::Kernel { .. }) => text("kernel"),
            ("boot.from", BootSpec::Disk { .. }) => text("disk"),
            ("boot.kernel", BootSpec::Kernel { kernel, .. }) => text(kernel),
            ("boot.initrd", BootSpec::Kernel { initrd, .. }) => text(initrd.as_deref()?),
            ("boot.disk", BootSpec::Disk { disk, .. }) => text(disk.as_deref()?),
            ("boot.cmdline", BootSpec::Kernel { cmdline, .. } | BootSpec::Disk { cmdline, .. }) => {
                text(cmdline)
            }
            _ => {
                let key = path.strip_prefix("labels.")?;
                self.labels.get(key).cloned().map(Value::Text)
            }
        }
    }

    /// Writes one value of one of its objects, or takes it away.
    ///
    /// # Errors
    /// The reason, as the end of a sentence that begins with the field.
    pub fn put(&mut self, part: &Part, path: &str, value: Option<Value>) -> Result<(), String> {
        let slot = schema().slot(path).ok_or("does not exist")?;
        let field = schema().field(slot.field).ok_or("does not exist")?;
        if field.kind != part.kind() {
            return Err(format!("is a field of a {}", field.kind));
        }
        if field.steer == Steer::Fixed {
            return Err("was fixed when the VM was created".to_owned());
        }
        if let Some(value) = &value {
            field.value.check(value)?;
        }
        match part {
            Part::Vm => self.put_vm(path, value),
            Part::Disk(name) => {
                let disk = self.disks.iter_mut().find(|disk| disk.name == *name);
                put_disk(disk.ok_or("belongs to no disk of the VM")?, path, value)
            }
            Part::Nic(name) => {
                let nic = self.nics.iter_mut().find(|nic| nic.name == *name);
                let nic = nic.ok_or("belongs to no interface of the VM")?;
                match path {
                    "nic.bridge" => nic.bridge = words(value),
                    _ => return Err("cannot be changed".to_owned()),
                }
                Ok(())
            }
        }
    }

    fn put_vm(&mut self, path: &str, value: Option<Value>) -> Result<(), String> {
        match (path, &mut self.boot) {
            ("cpus", _) => self.cpus = small(value, "cpus")?.unwrap_or(0),
            ("memory", _) => self.memory = Bytes(int(value).unwrap_or(0)),
            ("console", _) => {
                self.console = match words(value).as_deref() {
                    Some("virtio") => Some(ConsoleKind::Virtio),
                    Some(_) => Some(ConsoleKind::Serial),
                    None => None,
                }
            }
            ("boot.kernel", BootSpec::Kernel { kernel, .. }) => {
                *kernel = words(value).ok_or("cannot be left out")?;
            }
            ("boot.initrd", BootSpec::Kernel { initrd, .. }) => *initrd = words(value),
            ("boot.disk", BootSpec::Disk { disk, .. }) => *disk = words(value),
            ("boot.cmdline", BootSpec::Kernel { cmdline, .. } | BootSpec::Disk { cmdline, .. }) => {
                *cmdline = words(value).unwrap_or_default()
            }
            (path, _) => match path.strip_prefix("labels.") {
                Some(key) => {
                    match words(value) {
                        Some(value) => self.labels.insert(key.to_owned(), value),
                        None => self.labels.remove(key),
                    };
                }
                None => return Err("does not go with this VM's `boot.from`".to_owned()),
            },
        }
        Ok(())
    }
}

fn disk_value(disk: &DiskSpec, path: &str) -> Option<Value> {
    match path {
        "disk.name" => text(&disk.name),
        "disk.image" => text(&disk.image),
        "disk.format" => text(disk.format?.name()),
        "disk.size" => disk.size.map(|size| number(size.0)),
        "disk.read-only" => disk.read_only.then_some(Value::Bool(true)),
        "disk.queues" => disk.queues.map(number),
        "disk.iops" => disk.iops.map(number),
        "disk.bandwidth" => disk.bandwidth.map(|rate| number(rate.0)),
        _ => None,
    }
}

fn put_disk(disk: &mut DiskSpec, path: &str, value: Option<Value>) -> Result<(), String> {
    match path {
        "disk.queues" => disk.queues = small(value, "queues")?,
        "disk.iops" => disk.iops = int(value),
        "disk.bandwidth" => disk.bandwidth = int(value).map(Bytes),
        _ => return Err("cannot be changed".to_owned()),
    }
    Ok(())
}

fn nic_value(nic: &NicSpec, path: &str) -> Option<Value> {
    match path {
        "nic.name" => text(&nic.name),
        "nic.tap" => text(nic.tap.as_deref()?),
        "nic.bridge" => text(nic.bridge.as_deref()?),
        "nic.mac" => text(nic.mac.as_deref()?),
        _ => None,
    }
}

fn int(value: Option<Value>) -> Option<u64> {
    match value {
        Some(Value::Int(n)) => Some(n),
        _ => None,
    }
}

fn small<T: TryFrom<u64>>(value: Option<Value>, what: &str) -> Result<Option<T>, String> {
    int(value)
        .map(|n| T::try_from(n).map_err(|_| format!("cannot be {n} ({what})")))
        .transpose()
}

fn words(value: Option<Value>) -> Option<String> {
    match value {
        Some(Value::Text(text)) => Some(text),
        _ => None,
    }
}
