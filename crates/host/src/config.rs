//! Where the daemon keeps things.

use std::path::{Path, PathBuf};

/// The daemon's places, as its command line gives them.
#[derive(Debug, Clone)]
pub struct HostConfig {
    /// What outlives a reboot: the inventory and the VMs' console logs.
    pub state_dir: PathBuf,
    /// What does not: sockets and the monitors' logs.
    pub run_dir: PathBuf,
    /// The monitor's program.
    pub vmm: PathBuf,
    /// `/dev/kvm`; another path serves tests.
    pub kvm: PathBuf,
}

impl HostConfig {
    /// The inventory's database.
    #[must_use]
    pub fn inventory(&self) -> PathBuf {
        self.state_dir.join("inventory.sqlite")
    }

    /// The files of one VM that outlive a reboot.
    #[must_use]
    pub fn vm_state(&self, vm: &str) -> PathBuf {
        self.state_dir.join("vms").join(vm)
    }

    /// The files of one VM that do not.
    #[must_use]
    pub fn vm_run(&self, vm: &str) -> PathBuf {
        self.run_dir.join("vms").join(vm)
    }

    /// What the guest wrote to its serial console.
    #[must_use]
    pub fn console_log(&self, vm: &str) -> PathBuf {
        self.vm_state(vm).join("console.log")
    }

    /// The monitor's standard error.
    #[must_use]
    pub fn monitor_log(&self, vm: &str) -> PathBuf {
        self.vm_run(vm).join("monitor.log")
    }

    /// What the monitor saw last, for when it cannot tell any more.
    #[must_use]
    pub fn monitor_observations(&self, vm: &str) -> PathBuf {
        self.vm_run(vm).join("observations")
    }

    /// The same of a monitor that is about to take the guest over.
    #[must_use]
    pub fn next_observations(&self, vm: &str) -> PathBuf {
        self.vm_run(vm).join("observations.next")
    }

    /// The monitor's control socket.
    #[must_use]
    pub fn control_socket(&self, vm: &str) -> PathBuf {
        self.vm_run(vm).join("control.sock")
    }
}

impl HostConfig {
    /// The control socket of a monitor that is to take a VM over, until it has.
    #[must_use]
    pub fn next_socket(&self, vm: &str) -> PathBuf {
        self.vm_run(vm).join("control-next.sock")
    }
}

/// A path as text for observations.
pub(crate) fn show(path: &Path) -> String {
    path.display().to_string()
}
