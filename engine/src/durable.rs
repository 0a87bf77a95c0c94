//! Files and directories under names that a cut of power does not take away: what is renamed or made here is flushed
//! with the directory that names it, before the call returns. A file system may otherwise keep the name for half a
//! minute without the content, or neither.
//!
//! Never does: deciding what is in a file.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Gives a file its content, all of it or none. It keeps its permissions; a symbolic link in its place becomes a file.
///
/// # Errors
/// The file system's; the file is as it was, or new.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let temp = with_suffix(path, ".new");
    let before = fs::metadata(path).map(|before| before.permissions());
    let written = File::create(&temp).and_then(|mut file| {
        if let Ok(permissions) = before {
            file.set_permissions(permissions)?;
        }
        file.write_all(bytes)?;
        file.sync_all()
    });
    let done = written.and_then(|()| rename(&temp, path));
    if done.is_err() {
        // On a full disk it is in everybody's way. After the rename it is not there.
        let _ = fs::remove_file(&temp);
    }
    done
}

/// Renames a file within its directory. Its content is the caller's to flush, before.
///
/// # Errors
/// The file system's; the name may be the old or the new one then.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    sync_directory_of(to)
}

/// Makes a directory and those above it that are missing.
///
/// # Errors
/// The file system's; some of them may be there then.
pub fn create_dir_all(dir: &Path) -> io::Result<()> {
    let dir = std::path::absolute(dir)?;
    let missing: Vec<&Path> = dir.ancestors().take_while(|d| !d.exists()).collect();
    fs::create_dir_all(&dir)?;
    missing.into_iter().try_for_each(sync_directory_of)
}

/// Flushes the directory in which a path is.
///
/// # Errors
/// The file system's.
pub fn sync_directory_of(path: &Path) -> io::Result<()> {
    File::open(directory_of(path))?.sync_all()
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The path with something behind its name.
#[must_use]
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_nothing_is_left_beside_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        replace(&path, b"a long first content").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        replace(&path, b"second").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"second");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_replaced_is_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        // A rename of a file onto a directory fails.
        let path = dir.path().join("directory");
        fs::create_dir_all(path.join("inner")).unwrap();
        replace(&path, b"text").unwrap_err();
        assert!(path.join("inner").is_dir());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn directories_are_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b/c");
        create_dir_all(&deep).unwrap();
        create_dir_all(&deep).unwrap();
        assert!(deep.is_dir());
        fs::write(dir.path().join("file"), "").unwrap();
        create_dir_all(&dir.path().join("file/below")).unwrap_err();
    }

    #[test]
    fn a_name_alone_is_in_the_current_directory() {
        assert_eq!(directory_of(Path::new("name")), Path::new("."));
        assert_eq!(directory_of(Path::new("/a/name")), Path::new("/a"));
    }
}
