//! The user's guide to profiles is true: every command in it is run against a daemon, and what the
//! guide shows is what the command prints. `STRAKE_WRITE_DOCS=1` writes what it prints into the guide.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

use std::path::{Path, PathBuf};
use std::process::Command;

use strake_host::{Host, HostConfig, server};
use tempfile::TempDir;

/// Where the guide says that the files are.
const SHOWN: &str = "/etc/strake/profiles";

/// A daemon in this process, and the folder that the guide's commands run in.
struct World {
    dir: TempDir,
    _runtime: tokio::runtime::Runtime,
}

impl World {
    fn new() -> Self {
        let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let config = HostConfig {
            state_dir: dir.path().join("state"),
            run_dir: dir.path().join("run"),
            vmm: PathBuf::from("/nonexistent"),
            kvm: PathBuf::from("/dev/null"),
        };
        for name in ["fast", "slow", "work"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let socket = config.run_dir.join("straked.sock");
        let host = Host::open(config).unwrap();
        let socket = server::Socket::bind(&socket).unwrap();
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.spawn(server::serve(host, socket, std::future::pending()));
        let world = Self {
            dir,
            _runtime: runtime,
        };
        for name in ["fast", "slow"] {
            let path = world.dir.path().join(name);
            world.run(&format!("strake datastore add {name} {}", path.display()));
        }
        world
    }

    fn work(&self) -> PathBuf {
        self.dir.path().join("work")
    }

    /// What a command prints, with its places as the guide has them.
    fn run(&self, command: &str) -> String {
        let programs = Path::new(env!("CARGO_BIN_EXE_strake")).parent().unwrap();
        let path = std::env::var("PATH").unwrap_or_default();
        let done = Command::new("sh")
            .args(["-c", &format!("exec 2>&1; {command}")])
            .env("PATH", format!("{}:{path}", programs.display()))
            .env("STRAKE_SOCKET", self.dir.path().join("run/straked.sock"))
            .current_dir(self.work())
            .output()
            .unwrap();
        let work = std::fs::canonicalize(self.work()).unwrap();
        let text = String::from_utf8(done.stdout).unwrap();
        let lines = text.replace(work.to_str().unwrap(), SHOWN);
        let lines = lines.lines().map(|line| format!("{}\n", line.trim_end()));
        lines.collect()
    }
}

/// The guide with its blocks run: files are written, commands' output is what they printed.
fn played(guide: &str, world: &World) -> String {
    let mut out = String::new();
    let mut lines = guide.lines();
    let mut file = None;
    while let Some(line) = lines.next() {
        out.push_str(line);
        out.push('\n');
        if let Some(name) = line.strip_prefix("<!-- file: ") {
            file = name.strip_suffix(" -->");
        }
        let Some(kind) = line.strip_prefix("```").filter(|kind| !kind.is_empty()) else {
            continue;
        };
        let body: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
        if kind == "console" {
            for command in body.iter().filter_map(|line| line.strip_prefix("$ ")) {
                out.push_str(&format!("$ {command}\n"));
                out.push_str(&world.run(command));
            }
        } else {
            let text = format!("{}\n", body.join("\n"));
            if let Some(name) = file.take() {
                std::fs::write(world.work().join(name), &text).unwrap();
            }
            out.push_str(&text);
        }
        out.push_str("```\n");
    }
    out
}

#[test]
fn the_guide_to_profiles_shows_what_happens() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/src/profiles.md");
    let guide = std::fs::read_to_string(&path).unwrap();
    let played = played(&guide, &World::new());
    if std::env::var_os("STRAKE_WRITE_DOCS").is_some() {
        std::fs::write(&path, &played).unwrap();
        return;
    }
    for (number, (shown, is)) in guide.lines().zip(played.lines()).enumerate() {
        assert_eq!(shown, is, "docs/src/profiles.md:{}", number + 1);
    }
    assert_eq!(guide.lines().count(), played.lines().count());
}
