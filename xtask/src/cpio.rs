//! A writer of `newc` cpio archives, the format that the kernel unpacks as its first file system.
//!
//! The kernel takes several archives one after another, so a run's own files are simply appended
//! to a cached base.

use std::collections::BTreeMap;
use std::io::{self, Write};

/// What stands at a path.
#[derive(Debug, Clone)]
enum Node {
    Directory,
    File { mode: u32, content: Vec<u8> },
    Symlink { target: String },
    Device { major: u32, minor: u32 },
}

/// A tree of files to be archived. Parent folders appear by themselves.
#[derive(Debug, Clone, Default)]
pub struct Tree {
    nodes: BTreeMap<String, Node>,
}

impl Tree {
    /// A folder.
    pub fn directory(&mut self, path: &str) {
        let path = clean(path);
        self.parents(&path);
        self.nodes.entry(path).or_insert(Node::Directory);
    }

    /// A file; `mode` is its permission bits.
    pub fn file(&mut self, path: &str, mode: u32, content: impl Into<Vec<u8>>) {
        let path = clean(path);
        self.parents(&path);
        self.nodes.insert(
            path,
            Node::File {
                mode,
                content: content.into(),
            },
        );
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        let path = clean(path);
        self.parents(&path);
        self.nodes.insert(
            path,
            Node::Symlink {
                target: target.to_owned(),
            },
        );
    }

    /// A character device, for what the first process needs before `/dev` is mounted.
    pub fn device(&mut self, path: &str, major: u32, minor: u32) {
        let path = clean(path);
        self.parents(&path);
        self.nodes.insert(path, Node::Device { major, minor });
    }

    /// Whether something stands at the path.
    #[must_use]
    pub fn contains(&self, path: &str) -> bool {
        self.nodes.contains_key(&clean(path))
    }

    fn parents(&mut self, path: &str) {
        let mut end = 0;
        while let Some(slash) = path.get(end..).and_then(|rest| rest.find('/')) {
            end += slash;
            if let Some(parent) = path.get(..end) {
                self.nodes
                    .entry(parent.to_owned())
                    .or_insert(Node::Directory);
            }
            end += 1;
        }
    }

    /// Writes the archive, its trailer included, padded to 512 bytes.
    ///
    /// # Errors
    /// If the output cannot be written, or a file has 4 GiB or more, which the format cannot say.
    pub fn write(&self, out: impl Write) -> io::Result<()> {
        let mut archive = Archive { out, written: 0 };
        for (inode, (path, node)) in (1_u32..).zip(&self.nodes) {
            match node {
                Node::Directory => archive.entry(inode, path, 0o040_755, (0, 0), b"")?,
                Node::File { mode, content } => {
                    archive.entry(inode, path, 0o100_000 | mode, (0, 0), content)?;
                }
                Node::Symlink { target } => {
                    archive.entry(inode, path, 0o120_777, (0, 0), target.as_bytes())?;
                }
                Node::Device { major, minor } => {
                    archive.entry(inode, path, 0o020_600, (*major, *minor), b"")?;
                }
            }
        }
        archive.entry(0, "TRAILER!!!", 0, (0, 0), b"")?;
        archive.pad(512)
    }
}

fn clean(path: &str) -> String {
    path.trim_matches('/').to_owned()
}

struct Archive<W> {
    out: W,
    written: usize,
}

impl<W: Write> Archive<W> {
    fn entry(
        &mut self,
        inode: u32,
        path: &str,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> io::Result<()> {
        let too_big = |_| io::Error::new(io::ErrorKind::FileTooLarge, path.to_owned());
        let size = u32::try_from(content.len()).map_err(too_big)?;
        let name_size = u32::try_from(path.len() + 1).map_err(too_big)?;
        let links = 1;
        let header = format!(
            "070701{inode:08x}{mode:08x}{:08x}{:08x}{links:08x}{:08x}{size:08x}{:08x}{:08x}{:08x}{:08x}{name_size:08x}{:08x}",
            0, 0, 0, 0, 0, device.0, device.1, 0
        );
        self.put(header.as_bytes())?;
        self.put(path.as_bytes())?;
        self.put(&[0])?;
        self.pad(4)?;
        self.put(content)?;
        self.pad(4)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    fn pad(&mut self, to: usize) -> io::Result<()> {
        let missing = self.written.next_multiple_of(to) - self.written;
        self.put(&[0; 512][..missing.min(512)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_come_before_their_children_and_once() {
        let mut tree = Tree::default();
        tree.file("/usr/bin/a", 0o755, *b"x");
        tree.file("usr/bin/b", 0o755, *b"yy");
        let mut bytes = Vec::new();
        tree.write(&mut bytes).unwrap();
        assert_eq!(bytes.len() % 512, 0);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let at = |name: &str| text.find(&format!("{name}\0")).unwrap();
        assert!(at("usr") < at("usr/bin") && at("usr/bin") < at("usr/bin/a"));
        assert_eq!(
            text.matches("070701").count(),
            5,
            "usr, usr/bin, a, b, trailer"
        );
    }

    #[test]
    fn names_and_contents_are_padded_to_four_bytes() {
        let mut tree = Tree::default();
        tree.file("ab", 0o644, *b"12345");
        let mut bytes = Vec::new();
        tree.write(&mut bytes).unwrap();
        // 110 bytes of header and "ab\0" make 113, so the content starts at 116.
        assert_eq!(&bytes[116..121], b"12345");
        assert_eq!(&bytes[124..130], b"070701");
    }
}
