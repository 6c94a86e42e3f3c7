//! The daemon and the monitor's binary.

use std::path::PathBuf;

use serde_json::json;

use super::observations::{NoMonitor, VersionsDiffer};
use super::{Check, Need};
use crate::client::Client;

pub(super) async fn checks(client: &Client) -> Vec<Check> {
    vec![monitor(), daemon(client).await]
}

async fn daemon(client: &Client) -> Check {
    const NAME: &str = "daemon";
    let info = match client.host().await {
        Ok(info) => info,
        Err(problem) => return Check::cannot(NAME, Need::Useful, problem),
    };
    let own = env!("CARGO_PKG_VERSION");
    let data = json!({ "client": own, "daemon": info });
    let check = if info.version == own {
        Check::ok(
            NAME,
            format!(
                "version {own}, pid {}, {} of {} VMs run",
                info.pid, info.running, info.vms
            ),
        )
    } else {
        let problem = VersionsDiffer {
            client: own.to_owned(),
            daemon: info.version.clone(),
        };
        Check::cannot(NAME, Need::Useful, problem)
    };
    check.with(data)
}

fn monitor() -> Check {
    const NAME: &str = "monitor";
    let named = std::env::var_os("STRAKE_VMM").map(PathBuf::from);
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join("strake-vmm")));
    match named.or(beside).filter(|path| path.is_file()) {
        Some(path) => Check::ok(NAME, path.display().to_string()),
        None => Check::cannot(NAME, Need::Useful, NoMonitor {}),
    }
}
