//! Debian's stock cloud kernel and its modules: the lab host and the test guests both run it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use strake_observe::{OsContext, Result};

use crate::cpio::Tree;
use crate::observations::{ModuleMissing, PackageUnexpected};
use crate::{packages, tool, workspace};

/// The meta package that names the current cloud kernel.
const META: &str = "linux-image-cloud-amd64";

/// An unpacked kernel package.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// For example `6.1.0-56-cloud-amd64`.
    pub version: String,
    /// The bzImage.
    pub image: PathBuf,
    /// Module name to its file.
    files: BTreeMap<String, PathBuf>,
    builtin: String,
}

/// Debian's cloud kernel, fetched at the first use. Which one is remembered, so that no command
/// asks the package manager twice.
///
/// # Errors
/// If it cannot be had.
pub fn cloud() -> Result<Kernel> {
    let note = workspace::lab_dir()?.join("pkg/kernel.name");
    let package = match fs::read_to_string(&note) {
        Ok(name) => name,
        Err(_) => {
            let name = packages::kernel_package(META)?;
            if let Some(dir) = note.parent() {
                fs::create_dir_all(dir).os("mkdir", dir.display())?;
            }
            fs::write(&note, &name).os("write", note.display())?;
            name
        }
    };
    Kernel::open(&packages::unpacked(&package)?, &package)
}

impl Kernel {
    fn open(dir: &Path, package: &str) -> Result<Self> {
        let version = package
            .trim_start_matches("linux-image-")
            .trim_end_matches("-unsigned")
            .to_owned();
        let missing = |wanted: &str| PackageUnexpected {
            package: package.to_owned(),
            wanted: wanted.to_owned(),
        };
        let image = dir.join("boot").join(format!("vmlinuz-{version}"));
        if !image.exists() {
            return Err(missing("kernel image").into());
        }
        let modules = ["lib/modules", "usr/lib/modules"]
            .iter()
            .map(|place| dir.join(place).join(&version))
            .find(|place| place.is_dir())
            .ok_or_else(|| missing("modules"))?;
        let builtin = fs::read_to_string(modules.join("modules.builtin")).unwrap_or_default();
        Ok(Self {
            version,
            image,
            files: find_modules(&modules)?,
            builtin,
        })
    }

    /// The files of these modules and of all that they need, in an order in which they can be
    /// loaded, put into the tree under `/lib/strake-modules`; `list` becomes the file that names
    /// them one per line. Modules that are built into the kernel need nothing.
    ///
    /// # Errors
    /// If the kernel has no such module.
    pub fn add_modules(&self, tree: &mut Tree, list: &str, wanted: &[&str]) -> Result<()> {
        let mut loaded = Vec::new();
        for name in wanted {
            self.visit(&name.replace('-', "_"), tree, &mut loaded)?;
        }
        let lines: String = loaded
            .iter()
            .map(|name| format!("{}\n", place_of(name)))
            .collect();
        tree.file(list, 0o644, lines);
        Ok(())
    }

    fn visit(&self, name: &str, tree: &mut Tree, loaded: &mut Vec<String>) -> Result<()> {
        if loaded.iter().any(|seen| seen == name) {
            return Ok(());
        }
        let Some(file) = self.files.get(name) else {
            if self.is_builtin(name) {
                return Ok(());
            }
            return Err(ModuleMissing {
                module: name.to_owned(),
                kernel: self.version.clone(),
            }
            .into());
        };
        let content = read_module(file)?;
        for need in needs_of(&content) {
            self.visit(&need, tree, loaded)?;
        }
        tree.file(&place_of(name), 0o644, content);
        loaded.push(name.to_owned());
        Ok(())
    }

    fn is_builtin(&self, name: &str) -> bool {
        self.builtin.lines().any(|line| module_name(line) == name)
    }
}

fn place_of(name: &str) -> String {
    format!("/lib/strake-modules/{name}.ko")
}

fn find_modules(base: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![base.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)
            .os("readdir", folder.display())?
            .flatten()
        {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(path);
            } else if path.to_string_lossy().contains(".ko") {
                files.insert(module_name(&path.to_string_lossy()), path);
            }
        }
    }
    Ok(files)
}

fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split(".ko").next().unwrap_or(name).replace('-', "_")
}

/// What a module says it needs: the `depends=` line of its `.modinfo` section, of which there is
/// just one. (`modules.dep` only exists once a package has been installed.)
fn needs_of(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module.get(at + KEY.len()..).unwrap_or_default();
    let end = value
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(value.len());
    String::from_utf8_lossy(value.get(..end).unwrap_or_default())
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

/// Newer distributions compress their modules; the lab loads them plain.
fn read_module(file: &Path) -> Result<Vec<u8>> {
    let unpacker = match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(file).os("read", file.display()),
    };
    let output = tool::command(unpacker)
        .arg("-dc")
        .arg(file)
        .output()
        .os("exec", unpacker)?;
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_come_first_and_once() {
        let dir = tempfile::tempdir().unwrap();
        let module = |name: &str, needs: &str| {
            let path = dir.path().join(name);
            fs::write(
                &path,
                format!("ELF\0license=GPL\0depends={needs}\0name=x\0"),
            )
            .unwrap();
        };
        module("kvm-amd.ko", "kvm,ccp");
        module("kvm.ko", "irqbypass");
        module("ccp.ko", "");
        module("irqbypass.ko", "");
        let kernel = Kernel {
            version: "1".into(),
            image: PathBuf::new(),
            files: find_modules(dir.path()).unwrap(),
            builtin: "kernel/fs/ext4/ext4.ko\n".into(),
        };
        let mut order = Vec::new();
        let mut tree = Tree::default();
        for name in ["ext4", "kvm_amd", "kvm"] {
            kernel.visit(name, &mut tree, &mut order).unwrap();
        }
        assert_eq!(order, ["irqbypass", "kvm", "ccp", "kvm_amd"]);
        assert!(kernel.visit("no_such", &mut tree, &mut order).is_err());
    }
}
