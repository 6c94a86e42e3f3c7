//! Names: of VMs, of datastores, of devices, of images.

use std::path::{Path, PathBuf};

/// The most characters of a VM's or datastore's name: what a host name label may have.
pub const MAX_NAME: usize = 63;

/// The most characters of a disk's or interface's name: what virtio-blk has for a serial number,
/// so that the guest finds the disk as `/dev/disk/by-id/virtio-NAME`.
pub const MAX_DEVICE_NAME: usize = 20;

/// The most bytes of an image's file name: what file systems allow (255), less what the name of
/// its journal adds.
pub const MAX_FILE_NAME: usize = 200;

/// The most bytes of a path: the paths of the largest VM fit into one control packet.
pub const MAX_PATH: usize = 1024;

/// Checks a name: letters, digits, `-`, `_` and `.`, a letter or digit first, at most `longest`
/// characters.
///
/// # Errors
/// The reason, as the end of a sentence that begins with the name.
pub fn check_name(name: &str, longest: usize) -> Result<(), String> {
    let Some(first) = name.chars().next() else {
        return Err("a name cannot be empty".to_owned());
    };
    if name.len() > longest {
        return Err(format!("a name has at most {longest} characters"));
    }
    if !first.is_ascii_alphanumeric() {
        return Err("a name begins with a letter or a digit".to_owned());
    }
    match name
        .chars()
        .find(|c| !(c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.')))
    {
        Some(other) => Err(format!(
            "a name consists of letters, digits, '-', '_' and '.', not '{}'",
            other.escape_default()
        )),
        None => Ok(()),
    }
}

/// Where an image is, as a spec names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImageRef {
    /// `DATASTORE:FILE`.
    InStore {
        /// The datastore's name.
        store: String,
        /// The file's name in its directory.
        file: String,
    },
    /// An absolute path.
    Path(PathBuf),
}

impl ImageRef {
    /// Reads `DATASTORE:FILE` or an absolute path.
    ///
    /// # Errors
    /// The reason.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.chars().any(char::is_control) {
            return Err("an image's name has no control characters".to_owned());
        }
        if text.starts_with('/') {
            return Self::absolute(text);
        }
        let Some((store, file)) = text.split_once(':') else {
            return Err(format!(
                "'{text}' is neither DATASTORE:FILE nor an absolute path"
            ));
        };
        check_name(store, MAX_NAME).map_err(|reason| format!("datastore '{store}': {reason}"))?;
        if file.is_empty() {
            return Err("the file name after the ':' is missing".to_owned());
        }
        if file.contains('/') {
            return Err(format!(
                "'{file}' has a '/': an image lies directly in its datastore"
            ));
        }
        if file.starts_with('.') {
            return Err(format!(
                "'{file}' begins with a '.': such names are kept for journals"
            ));
        }
        if file.len() > MAX_FILE_NAME {
            return Err(format!("a file name has at most {MAX_FILE_NAME} bytes"));
        }
        Ok(Self::InStore {
            store: store.to_owned(),
            file: file.to_owned(),
        })
    }

    fn absolute(text: &str) -> Result<Self, String> {
        let path = Path::new(text);
        let climbs = text
            .split('/')
            .any(|part| part == ".." || part.len() > MAX_FILE_NAME);
        if climbs {
            return Err(format!(
                "'{text}' has a '..' or a part longer than {MAX_FILE_NAME} bytes"
            ));
        }
        if text.len() > MAX_PATH {
            return Err(format!("a path has at most {MAX_PATH} bytes"));
        }
        if path.file_name().is_none() || text.ends_with('/') {
            return Err(format!("'{text}' is a directory, not an image"));
        }
        Ok(Self::Path(path.to_owned()))
    }
}

/// Reads a MAC address, `aa:bb:cc:dd:ee:ff`, of one station.
///
/// # Errors
/// The reason.
pub fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("'{text}' is not a MAC address such as 52:54:00:12:34:56");
    let mut mac = [0u8; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().ok_or_else(wrong)?;
        if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    if parts.next().is_some() {
        return Err(wrong());
    }
    if mac[0] & 1 == 1 {
        return Err(format!("'{text}' is a group address, not one of a station"));
    }
    if mac == [0; 6] {
        return Err(format!("'{text}' is no address"));
    }
    Ok(mac)
}
