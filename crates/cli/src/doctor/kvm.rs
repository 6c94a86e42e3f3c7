//! KVM, and whether it runs stock kernels.

use std::path::Path;

use strake_probe::{Report, Verdict};

use super::{Check, Need};

pub(super) fn checks(device: &Path) -> Vec<Check> {
    from(&strake_probe::probe_at(device))
}

pub(super) fn from(report: &Report) -> Vec<Check> {
    if let (Verdict::Missing, Some(problem)) = (report.verdict, &report.problem) {
        let check = Check::cannot("kvm", Need::Required, problem.clone());
        return vec![check.with(&report.capabilities)];
    }
    let version = report
        .api_version
        .map_or_else(|| "unknown".to_owned(), |version| version.to_string());
    let found = format!(
        "API version {version}, all {} capabilities",
        report.capabilities.len()
    );
    let kvm = Check::ok("kvm", found).with(&report.capabilities);
    let rate = match report.instructions_per_second {
        Some(rate) => format!(
            "{} million ring-0 instructions per second",
            rate / 1_000_000
        ),
        None => "the measuring loop does not run".to_owned(),
    };
    let kernels = match &report.problem {
        None => Check::ok("stock kernels", rate),
        Some(problem) => Check::cannot("stock kernels", Need::Required, problem.clone()),
    };
    vec![kvm, kernels.with(report)]
}
