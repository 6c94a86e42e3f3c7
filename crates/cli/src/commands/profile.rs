//! `strake profile`

use std::fmt::Write as _;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde_json::json;
use strake_api::schema::{FIELDS, Steer, Value, json_schema};
use strake_api::steer::{
    ApplyProfiles, EffectiveObject, ProfileFile, ProfileSummary, ProfileText, SteerPlan,
};
use strake_observe::{Because, OsContext, Result};

use crate::context::Context;
use crate::exit::Exit;
use crate::observations::ProfileFileUnreadable;
use crate::output::{Align, Table};

/// The largest profile that is read: longer ones are refused.
const MAX_PROFILE: u64 = (256 << 10) + 1;

/// Steer many VMs by few profiles, and see where every value comes from
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  strake profile plan slow.toml && strake profile apply slow.toml

slow.toml:
  name = \"slow-store\"
  priority = 100
  [match]
  kind = \"disk\"
  datastore.tier = \"slow\"
  [max]
  disk.iops = 500")]
pub struct Args {
    /// What to do
    #[command(subcommand)]
    pub command: Profiles,
}

/// What can be done with profiles.
#[derive(Debug, Subcommand)]
pub enum Profiles {
    /// Put profiles in force, together, each in place of the one of its name
    #[command(after_help = "Example:\n  strake profile apply base.toml web.toml")]
    Apply {
        /// TOML files; `-` reads standard input
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Show what profiles would change, and what it takes, before anything happens
    #[command(after_help = "\
Examples:
  strake profile plan web.toml
  strake profile plan --rm web                  what its removal would change")]
    Plan {
        /// TOML files; `-` reads standard input
        #[arg(required_unless_present = "rm", value_name = "FILE")]
        files: Vec<PathBuf>,
        /// The removal of this profile instead
        #[arg(long, value_name = "NAME", conflicts_with = "files")]
        rm: Option<String>,
    },
    /// Take a profile out of force
    #[command(after_help = "Example:\n  strake profile rm web")]
    Rm {
        /// Its name
        name: String,
        /// Even if values of running VMs come from it
        #[arg(short, long)]
        force: bool,
    },
    /// List the profiles, the lowest priority first
    #[command(after_help = "Example:\n  strake profile ls")]
    Ls,
    /// Show a profile and what it is about
    #[command(after_help = "Example:\n  strake profile show web")]
    Show {
        /// Its name
        name: String,
    },
    /// Show what holds for a VM and its devices
    #[command(after_help = "Example:\n  strake profile effective web1 --explain")]
    Effective {
        /// The VM, or one of its devices as VM/DEVICE
        object: String,
        /// Tell of each value where it comes from, what it overrode and why
        #[arg(short, long)]
        explain: bool,
    },
    /// List the fields that can be set, and what a change takes; with --json the JSON Schema
    #[command(after_help = "Example:\n  strake profile fields")]
    Fields,
}

pub(super) async fn run(args: Args, context: &Context) -> Result<Exit> {
    match args.command {
        Profiles::Apply { files } => {
            let request = ApplyProfiles {
                profiles: read_all(&files)?,
                plan: false,
            };
            let plan = context.client.apply_profiles(&request).await?;
            show_plan(&plan, context)
        }
        Profiles::Plan { files, rm } => {
            let plan = match rm {
                Some(name) => context.client.remove_profile(&name, true, false).await?,
                None => {
                    let request = ApplyProfiles {
                        profiles: read_all(&files)?,
                        plan: true,
                    };
                    context.client.apply_profiles(&request).await?
                }
            };
            show_plan(&plan, context)
        }
        Profiles::Rm { name, force } => {
            let plan = context.client.remove_profile(&name, false, force).await?;
            show_plan(&plan, context)
        }
        Profiles::Ls => {
            let profiles = context.client.profiles().await?;
            context
                .output
                .answer(&profiles, |profiles| table(profiles))?;
            Ok(Exit::Done)
        }
        Profiles::Show { name } => {
            let profile = context.client.profile(&name).await?;
            context.output.answer(&profile, text)?;
            Ok(Exit::Done)
        }
        Profiles::Effective { object, explain } => {
            let vm = object.split_once('/').map_or(&*object, |(vm, _)| vm);
            let mut all = context.client.effective(vm).await?;
            all.retain(|known| vm == object || known.object == object);
            context.output.answer(&all, |all| effective(all, explain))?;
            Ok(Exit::Done)
        }
        Profiles::Fields => {
            context.output.answer(&json!(json_schema()), |_| fields())?;
            Ok(Exit::Done)
        }
    }
}

fn read_all(files: &[PathBuf]) -> Result<Vec<ProfileFile>> {
    files.iter().map(|file| read(file)).collect()
}

fn read(file: &Path) -> Result<ProfileFile> {
    let stdin = file == Path::new("-");
    let shown = if stdin {
        "standard input".to_owned()
    } else {
        // Whoever asks where a value comes from may ask from another directory.
        std::path::absolute(file)
            .unwrap_or_else(|_| file.to_owned())
            .display()
            .to_string()
    };
    let mut text = String::new();
    let read = if stdin {
        std::io::stdin()
            .lock()
            .take(MAX_PROFILE)
            .read_to_string(&mut text)
    } else {
        std::fs::File::open(file).and_then(|file| file.take(MAX_PROFILE).read_to_string(&mut text))
    };
    read.os("read", &shown)
        .because_of(|| ProfileFileUnreadable {
            file: shown.clone(),
        })?;
    Ok(ProfileFile { file: shown, text })
}

/// What a change changes, or would change. A plan with conflicts fails.
pub(super) fn show_plan(plan: &SteerPlan, context: &Context) -> Result<Exit> {
    context.output.answer(plan, plan_text)?;
    Ok(if plan.conflicts.is_empty() {
        Exit::Done
    } else {
        Exit::Failed
    })
}

fn plan_text(plan: &SteerPlan) -> String {
    let mut text = String::new();
    if !plan.changes.is_empty() {
        let mut table = Table::new(&[
            ("OBJECT", Align::Left),
            ("FIELD", Align::Left),
            ("CHANGE", Align::Left),
            ("CLASS", Align::Left),
            ("IN FORCE", Align::Left),
        ]);
        for change in &plan.changes {
            table.row([
                change.object.clone(),
                change.path.clone(),
                change.shown.clone(),
                change.class.name().to_owned(),
                change.when.text().to_owned(),
            ]);
        }
        text.push_str(&table.render());
    }
    for conflict in &plan.conflicts {
        let _ = writeln!(
            text,
            "conflict: {}\n  remedy: {}",
            conflict.text(),
            conflict.remedy()
        );
    }
    for warning in &plan.warnings {
        let _ = writeln!(
            text,
            "warning: {}\n  remedy: {}",
            warning.text(),
            warning.remedy()
        );
    }
    let nothing = plan.changes.is_empty() && plan.conflicts.is_empty();
    text.push_str(match (plan.applied, nothing) {
        (true, true) => "applied; no value changes\n",
        (true, false) => "applied\n",
        (false, true) => "no value would change\n",
        (false, false) => "nothing was changed: this is a plan\n",
    });
    text
}

fn table(profiles: &[ProfileSummary]) -> String {
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("PRIORITY", Align::Right),
        ("RULES", Align::Right),
        ("OBJECTS", Align::Right),
        ("FILE", Align::Left),
        ("DESCRIPTION", Align::Left),
    ]);
    for profile in profiles {
        table.row([
            profile.name.clone(),
            profile.priority.to_string(),
            profile.rules.to_string(),
            profile.objects.to_string(),
            profile.file.clone(),
            profile.description.lines().next().unwrap_or("").to_owned(),
        ]);
    }
    table.render()
}

fn text(profile: &ProfileText) -> String {
    let matches = match profile.matches.len() {
        0 => "nothing".to_owned(),
        _ => profile.matches.join(", "),
    };
    let ProfileSummary {
        name,
        priority,
        file,
        ..
    } = &profile.summary;
    format!(
        "profile {name}, priority {priority}, from {file}\nmatches {matches}\n\n{}",
        profile.text
    )
}

fn effective(objects: &[EffectiveObject], explain: bool) -> String {
    let mut text = String::new();
    for object in objects {
        let profiles = match object.profiles.len() {
            0 => "no profile".to_owned(),
            _ => object.profiles.join(", "),
        };
        let _ = writeln!(text, "{} ({}): {profiles}", object.object, object.kind);
        for value in &object.values {
            let origin: Vec<_> = value.origin.iter().map(|source| source.text()).collect();
            let _ = writeln!(
                text,
                "  {} = {}  ({})",
                value.path,
                value.shown,
                match origin.len() {
                    0 => "nobody says".to_owned(),
                    _ => origin.join(" and "),
                }
            );
            if !explain {
                continue;
            }
            for held in &value.held {
                let _ = writeln!(text, "      keeps {}", held.text());
            }
            for gone in &value.overrode {
                let _ = writeln!(
                    text,
                    "      not {}: {} {}: {}",
                    gone.shown,
                    gone.source.text(),
                    gone.why.text(),
                    gone.to.text()
                );
            }
        }
        for pending in &object.pending {
            let _ = writeln!(
                text,
                "  pending: {} {} ({})",
                pending.path,
                pending.shown,
                pending.when.text()
            );
        }
        for conflict in &object.conflicts {
            let _ = writeln!(text, "  conflict: {}", conflict.text());
        }
    }
    text
}

fn fields() -> String {
    let mut table = Table::new(&[
        ("FIELD", Align::Left),
        ("DEFAULT", Align::Left),
        ("MERGE", Align::Left),
        ("CHANGE", Align::Left),
        ("PROFILES", Align::Left),
        ("HOLDS", Align::Left),
    ]);
    for field in FIELDS {
        let default = match field.default {
            None => "–".to_owned(),
            Some(constant) => field.value.show(&Value::from(constant)),
        };
        table.row([
            field.path.to_owned(),
            default,
            field.merge.name().to_owned(),
            match field.steer {
                Steer::Fixed => "fixed".to_owned(),
                Steer::Profiles | Steer::Own => field.change.name().to_owned(),
            },
            match field.steer {
                Steer::Profiles => "yes".to_owned(),
                Steer::Own | Steer::Fixed => "no".to_owned(),
            },
            strake_api::schema::holds(field),
        ]);
    }
    table.render()
}
