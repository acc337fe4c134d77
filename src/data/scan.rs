//! Local files that are named by a path, a folder or a glob.
//!
//! Names are bytes: one that is not UTF-8 is matched and shown with its odd bytes replaced, and opened unchanged. Links
//! are followed, except to a folder above the link or one already walked; so loops end, and a file with several names
//! (the hub's cache keeps `snapshots/…` as links to `blobs/…`) is taken once. Of its names the one that shows its type
//! is kept.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs::{FileType, Metadata},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use super::{
    DataError,
    compressed::ending,
    input::{Input, MATCH, Place, Stamp, is_glob},
};

/// Device and inode.
type Inode = (u64, u64);

/// One step of a pattern.
enum Part {
    Literal(OsString),
    Glob(glob::Pattern),
    /// `**`
    Folders,
}

/// Collects files; each once.
#[derive(Default)]
pub(super) struct Scan {
    found: Vec<(Input, bool)>,
    /// Place in `found` of a file.
    files: BTreeMap<(Inode, u64), usize>,
    /// Folders walked for the pattern being expanded, with the parts of it that were left.
    walked: BTreeSet<(usize, Inode)>,
    /// Folders above the ones that are walked.
    above: BTreeSet<Inode>,
    /// Links to folders, with the parts of the pattern that are left: walked when all real folders are.
    links: Vec<(PathBuf, usize)>,
    /// What may not be read; a folder is asked for more than once.
    denied: BTreeSet<PathBuf>,
}

impl Scan {
    /// Adds the files that `spec`, whose path is `path`, names; returns whether it names any. Files below `out` are our
    /// own.
    pub(super) fn add(&mut self, spec: &str, path: &Path, out: Option<&Path>) -> Result<bool, DataError> {
        let invalid = |reason: String| DataError::Input { input: spec.to_owned(), reason };
        let text = path.to_str().ok_or_else(|| invalid("is not UTF-8".into()))?;
        let out = out.and_then(|path| path.canonicalize().ok());
        let mut parts = Vec::new();
        if let Err(error) = std::fs::read_dir(path)
            && error.kind() == io::ErrorKind::PermissionDenied
            && path.is_dir()
        {
            self.deny(path, &error, true);
            return Ok(true);
        }
        if path.is_dir() {
            parts.extend(literals(text));
            parts.push(Part::Folders);
            parts.push(any()?);
        } else if is_glob(text) && std::fs::symlink_metadata(path).is_err() {
            for part in text.split('/').filter(|part| !part.is_empty()) {
                parts.push(match part {
                    "**" => Part::Folders,
                    _ if is_glob(part) => {
                        Part::Glob(glob::Pattern::new(part).map_err(|error| invalid(error.to_string()))?)
                    }
                    _ => Part::Literal(part.into()),
                });
            }
            if matches!(parts.last(), Some(Part::Folders)) {
                parts.push(any()?);
            }
        } else {
            let before = self.found.len();
            return Ok(self.file(path.to_owned(), out.as_deref(), true)? || self.found.len() > before);
        }
        // Names have always been without a leading "./".
        let leading = parts.iter().take_while(|part| matches!(part, Part::Literal(name) if name == ".")).count();
        parts.drain(..leading);
        let root = PathBuf::from(if text.starts_with('/') { "/" } else { "" });
        self.walked.clear();
        self.above.clear();
        self.links.clear();
        let mut any = self.expand(&root, &parts, out.as_deref())?;
        let mut next = 0;
        while let Some((folder, left)) = self.links.get(next).cloned() {
            next += 1;
            any |= self.begin(&folder, &parts[parts.len() - left..], out.as_deref())?;
        }
        Ok(any)
    }

    /// The files found.
    pub(super) fn finish(self) -> Vec<Input> {
        self.found.into_iter().map(|(input, _)| input).collect()
    }

    fn expand(&mut self, folder: &Path, parts: &[Part], out: Option<&Path>) -> Result<bool, DataError> {
        let Some((part, rest)) = parts.split_first() else { return self.file(folder.to_owned(), out, false) };
        match part {
            Part::Literal(name) => {
                let next = folder.join(name);
                if std::fs::symlink_metadata(&next).is_err() {
                    return Ok(false);
                }
                self.expand(&next, rest, out)
            }
            Part::Glob(pattern) => {
                let mut any = false;
                for (name, _) in self.entries(folder)? {
                    if pattern.matches_with(&name.to_string_lossy(), MATCH) {
                        any |= self.expand(&folder.join(name), rest, out)?;
                    }
                }
                let here = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
                Ok(any || self.denied.contains(here))
            }
            Part::Folders => self.begin(folder, parts, out),
        }
    }

    /// Walks a folder that isn't below one being walked.
    fn begin(&mut self, folder: &Path, parts: &[Part], out: Option<&Path>) -> Result<bool, DataError> {
        let here = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        if let Ok(real) = here.canonicalize() {
            let above = real.ancestors().skip(1).filter_map(|folder| std::fs::metadata(folder).ok());
            self.above.extend(above.map(|metadata| (metadata.dev(), metadata.ino())));
        }
        self.walk(folder, parts, out)
    }

    /// Expands the part after `**` in `folder` and all folders below it.
    fn walk(&mut self, folder: &Path, parts: &[Part], out: Option<&Path>) -> Result<bool, DataError> {
        let here = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let metadata = match std::fs::metadata(here) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                self.deny(here, &error, false);
                return Ok(true);
            }
            Err(_) => return Ok(false),
        };
        let inode = (metadata.dev(), metadata.ino());
        if !metadata.is_dir() || self.above.contains(&inode) || !self.walked.insert((parts.len(), inode)) {
            return Ok(false);
        }
        let mut any = self.expand(folder, &parts[1..], out)?;
        for (name, kind) in self.entries(folder)? {
            if name.as_bytes().starts_with(b".") {
                continue;
            }
            let next = folder.join(name);
            if kind.is_symlink() && next.is_dir() {
                self.links.push((next, parts.len()));
            } else if kind.is_dir() {
                any |= self.walk(&next, parts, out)?;
            }
        }
        Ok(any)
    }

    /// Names in a folder, sorted, and the type of each; none if it is not a folder, or may not be read.
    fn entries(&mut self, folder: &Path) -> Result<Vec<(OsString, FileType)>, DataError> {
        let here = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let failed = |source| DataError::Io { doing: "read", path: here.to_owned(), source };
        let entries = match std::fs::read_dir(here) {
            Ok(entries) => entries,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotADirectory | io::ErrorKind::NotFound) => {
                return Ok(Vec::new());
            }
            Err(error) if is_loop(&error) => return Ok(Vec::new()),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                self.deny(here, &error, false);
                return Ok(Vec::new());
            }
            Err(error) => return Err(failed(error)),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed)?;
            names.push((entry.file_name(), entry.file_type().map_err(failed)?));
        }
        names.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(names)
    }

    /// Adds what may not be read, file or folder: it is left out, and counts as one file.
    fn deny(&mut self, path: &Path, error: &io::Error, named: bool) {
        let name = path.to_string_lossy().into_owned();
        if self.denied.insert(path.to_owned()) {
            let place = Place::Unreadable(format!("can't be opened: {error}"));
            self.found.push((Input { name, bytes: 0, place, named, stamp: None }, false));
        } else if let Some((before, _)) = self.found.iter_mut().find(|(input, _)| input.name == name) {
            before.named |= named;
        }
    }

    /// Adds a file, if it is one; returns whether it existed.
    fn file(&mut self, path: PathBuf, out: Option<&Path>, named: bool) -> Result<bool, DataError> {
        let name = path.to_string_lossy().into_owned();
        let mut stamp = None;
        let (place, bytes, inode) = match std::fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => return Ok(false),
            Ok(metadata) if metadata.is_file() => {
                // Known before anything is read, not after hours of encoding.
                if let Err(error) = rustix::fs::access(&path, rustix::fs::Access::READ_OK)
                    && error == rustix::io::Errno::ACCESS
                {
                    self.deny(&path, &error.into(), named);
                    return Ok(true);
                }
                stamp = Some(Stamp::of(&metadata));
                let inode = (metadata.ino() != 0).then(|| (metadata.dev(), metadata.ino()));
                (Place::Local(path.clone()), metadata.len(), inode)
            }
            Ok(metadata) => (Place::Unreadable(special(&metadata).into()), 0, None),
            Err(error) => match bad_link(&path, &error) {
                Some(reason) => (Place::Unreadable(reason.into()), 0, None),
                None if error.kind() == io::ErrorKind::NotFound => return Ok(false),
                None if error.kind() == io::ErrorKind::PermissionDenied => {
                    self.deny(&path, &error, named);
                    return Ok(true);
                }
                None => return Err(DataError::Io { doing: "read", path, source: error }),
            },
        };
        if let (Some(out), Ok(real)) = (out, path.canonicalize())
            && real.starts_with(out)
        {
            return Ok(false);
        }
        let link = std::fs::symlink_metadata(&path).is_ok_and(|metadata| metadata.is_symlink());
        let input = Input { name, bytes, place, named, stamp };
        // Some file systems give one number to all files: the size must agree, too.
        let Some(place) = inode.and_then(|inode| self.files.get(&(inode, bytes)).copied()) else {
            if let Some(inode) = inode {
                self.files.insert((inode, bytes), self.found.len());
            }
            self.found.push((input, link));
            return Ok(true);
        };
        let rank = |name: &str, link: bool| (ending(name).len() > 8 || ending(name) == name, link);
        if let Some((kept, kept_link)) = self.found.get_mut(place) {
            let named = named || kept.named;
            if (rank(&input.name, link), &input.name) < (rank(&kept.name, *kept_link), &kept.name) {
                (*kept, *kept_link) = (input, link);
            }
            kept.named = named;
        }
        Ok(true)
    }
}

fn any() -> Result<Part, DataError> {
    let pattern =
        glob::Pattern::new("*").map_err(|error| DataError::Input { input: "*".into(), reason: error.to_string() })?;
    Ok(Part::Glob(pattern))
}

fn literals(path: &str) -> impl Iterator<Item = Part> {
    path.split('/').filter(|part| !part.is_empty()).map(|part| Part::Literal(part.into()))
}

fn is_loop(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

/// What is wrong with a link that leads to no file.
fn bad_link(path: &Path, error: &io::Error) -> Option<&'static str> {
    if is_loop(error) {
        return Some("is a link that leads back to itself");
    }
    let link = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink());
    (link && error.kind() == io::ErrorKind::NotFound).then_some("is a link to something that is not there")
}

/// The type of a file that has no end, or no bytes of its own.
fn special(metadata: &Metadata) -> &'static str {
    let kind = metadata.file_type();
    if kind.is_fifo() {
        "is a pipe, which can be read once only; write it to a file first"
    } else if kind.is_socket() {
        "is a socket, not a file"
    } else {
        "is a device, not a file"
    }
}

#[cfg(test)]
mod tests {
    use std::{ffi::OsStr, os::unix::fs::symlink};

    use super::*;

    fn write(dir: &Path, name: impl AsRef<OsStr>, body: &str) {
        let path = dir.join(Path::new(name.as_ref()));
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, body).unwrap();
    }

    fn scan(dir: &Path, specs: &[&str]) -> Vec<Input> {
        let mut scan = Scan::default();
        for spec in specs {
            scan.add(spec, &dir.join(spec), None).unwrap();
        }
        let mut found = scan.finish();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        found
    }

    fn names(dir: &Path, specs: &[&str]) -> Vec<String> {
        let short = |input: Input| input.name.strip_prefix(dir.to_str().unwrap()).unwrap()[1..].to_owned();
        scan(dir, specs).into_iter().map(short).collect()
    }

    #[test]
    fn names_are_bytes() {
        let dir = tempfile::tempdir().unwrap();
        let odd = OsStr::from_bytes(b"caf\xe9/na\xefve.txt");
        write(dir.path(), odd, "one");
        write(dir.path(), OsStr::from_bytes(b"caf\xea/na\xefve.txt"), "two");
        for spec in ["", "**/*.txt", "caf*/*", "caf?/na?ve.txt", "**"] {
            let found = scan(dir.path(), &[spec]);
            assert_eq!(found.len(), 2, "{spec}");
            let Place::Local(path) = &found[0].place else { panic!() };
            assert!(path.is_file() && path.ends_with(odd), "{}", path.display());
        }
    }

    #[test]
    fn links_are_followed_once_and_never_upwards() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        write(root, "in/a/one.txt", "1");
        write(root, "in/b/two.txt", "2");
        write(root, "in/b/deep/three.txt", "3");
        write(root, "outside.txt", "x");
        write(root, "elsewhere/four.txt", "4");
        for (to, at) in [
            ("..", "in/up"),
            ("../..", "in/b/upper"),
            ("../b", "in/a/b"),
            ("../a", "in/b/a"),
            (".", "in/here"),
            ("self", "in/self"),
            ("../elsewhere", "in/else"),
            ("..", "elsewhere/back"),
            ("gone", "in/gone.txt"),
            ("a/one.txt", "in/also-one.txt"),
        ] {
            symlink(to, root.join(at)).unwrap();
        }
        std::fs::hard_link(root.join("in/b/two.txt"), root.join("in/zwei.txt")).unwrap();
        for spec in ["in", "in/**/*", "in/**"] {
            let found = scan(root, &[spec]);
            let readable: Vec<&str> = found
                .iter()
                .filter(|input| matches!(input.place, Place::Local(_)))
                .map(|input| input.name.strip_prefix(root.to_str().unwrap()).unwrap())
                .collect();
            assert_eq!(
                readable,
                ["/in/a/one.txt", "/in/b/deep/three.txt", "/in/b/two.txt", "/in/else/four.txt"],
                "{spec}"
            );
            let reasons: Vec<&str> = found
                .iter()
                .filter_map(
                    |input| if let Place::Unreadable(reason) = &input.place { Some(reason.as_str()) } else { None },
                )
                .collect();
            assert!(
                reasons.len() == 2 && reasons[0].contains("not there") && reasons[1].contains("itself"),
                "{reasons:?}"
            );
        }
        // Without ** a link is just a name.
        assert_eq!(names(root, &["in/up/*.txt"]), ["in/up/outside.txt"]);
    }

    #[test]
    fn a_file_in_the_hubs_cache_keeps_the_name_that_shows_its_type() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        write(root, "models/blobs/0123456789abcdef0123456789abcdef01234567", "{}");
        std::fs::create_dir_all(root.join("models/snapshots/main/data")).unwrap();
        let to = "../../../blobs/0123456789abcdef0123456789abcdef01234567";
        symlink(to, root.join("models/snapshots/main/data/train.jsonl")).unwrap();
        assert_eq!(names(root, &["models"]), ["models/snapshots/main/data/train.jsonl"]);
        assert_eq!(names(root, &["models/blobs", "models/snapshots"]), ["models/snapshots/main/data/train.jsonl"]);
    }

    #[test]
    fn anything_but_a_file_is_named_by_its_type() {
        let dir = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("a.sock")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            dir.path().join("pipe"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        let found = scan(dir.path(), &[""]);
        let reason = |at: usize| match &found[at].place {
            Place::Unreadable(reason) => reason.clone(),
            other => panic!("{other:?}"),
        };
        assert!(found.len() == 2 && reason(0).contains("socket") && reason(1).contains("pipe"));
        assert!(scan(dir.path(), &["pipe"])[0].named);
    }
}
