//! What NCCL and its flight recorder are told on a node of several: environment variables of its workers.
//!
//! A variable that the agent's own environment has stays as it is. Sources: `ProcessGroupNCCL.hpp` and
//! `FlightRecorder.hpp` of LibTorch 2.11.0; NCCL's manual for `NCCL_SOCKET_IFNAME`.
//!
//! | variable | value | why |
//! |---|---|---|
//! | `NCCL_SOCKET_IFNAME` | `=` and the interface of `network.address` | NCCL would take any; `=`: that very one |
//! | `TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC` | 120 | a watchdog that hangs ends its process, by default after 8 minutes |
//! | `TORCH_NCCL_ENABLE_MONITORING` | 1 | the thread that looks at the two below |
//! | `TORCH_NCCL_DUMP_ON_TIMEOUT` | 1 | a collective that ends by its limit leaves a trace |
//! | `TORCH_NCCL_COORD_CHECK_MILSEC` | 200 | how often that thread looks at its pipe: usually each second |
//! | `TORCH_NCCL_TRACE_BUFFER_SIZE`, `TORCH_FR_BUFFER_SIZE` | 2000 | collectives that a trace holds |
//! | `TORCH_NCCL_DEBUG_INFO_PIPE_FILE` | a stem: `<stem><rank>.pipe` | one byte, and the rank writes its trace |
//! | `TORCH_NCCL_DEBUG_INFO_TEMP_FILE`, `TORCH_FR_DUMP_TEMP_FILE` | a stem: `<stem><rank>` | where it writes it |
//!
//! `TORCH_NCCL_ASYNC_ERROR_HANDLING` keeps its default, 3: the process ends, and the communicator is not cleaned up.
//! Gloo needs no variable: each rank binds to the address from which it reaches rank 0 (`crate::torch`), so
//! `GLOO_SOCKET_IFNAME` would change nothing.
//!
//! **Never run:** no test has had a GPU. The variables are checked as values, the pipe and the file with a stand-in for
//! the rank.
//!
//! *Crash:* the folder stays in the system's temporary folder. *Retry:* each generation has its own. *Cancel:* dropping
//! [`Collectives`] removes the folder.

use std::{
    net::IpAddr,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    cloud::{hardware, routes},
    env,
    ids::{Rank, random_hex},
};

/// A name, other names of the same setting, and its value.
type Variable = (&'static str, &'static [&'static str], String);

const BUFFER: &[&str] = &["TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE"];
const FILE: &[&str] = &["TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_FR_DUMP_TEMP_FILE"];

/// What workers of a generation are told of their collectives. The default: nothing.
#[derive(Debug, Default)]
pub struct Collectives {
    variables: Vec<Variable>,
    recorder: Option<Recorder>,
}

/// Where ranks of this node are asked for traces, and leave them.
#[derive(Debug)]
pub struct Recorder {
    /// Of this process alone.
    folder: PathBuf,
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Recorder {
    /// With a new folder; `None`: there is none to be had, so there are no traces.
    pub fn new() -> Option<Self> {
        let folder = std::env::temp_dir().join(format!("trainer-traces-{}", random_hex(16)));
        match std::fs::DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => Some(Self { folder }),
            Err(error) => {
                tracing::debug!(%error, "no folder for traces of collectives");
                None
            }
        }
    }

    /// The pipe into which a byte asks this rank for its trace. The rank makes it.
    pub fn pipe(&self, rank: Rank) -> PathBuf {
        self.folder.join(format!("ask-{rank}.pipe"))
    }

    /// The file that it writes then.
    pub fn trace(&self, rank: Rank) -> PathBuf {
        self.folder.join(format!("trace-{rank}"))
    }
}

impl Collectives {
    /// For ranks that compute on GPUs, on a node of several that the others reach at `address`.
    pub fn on_gpus(address: IpAddr) -> Self {
        let interface = routes::interface(&hardware::root(), address);
        let recorder = Recorder::new();
        let variables = variables(interface.as_deref(), recorder.as_ref().map(|recorder| recorder.folder.as_path()));
        Self { variables, recorder }
    }

    /// Where traces are asked for, if ranks leave any.
    pub const fn recorder(&self) -> Option<&Recorder> {
        self.recorder.as_ref()
    }

    /// Adds what was not given by the agent's own environment.
    pub fn tell(&self, command: &mut Command) {
        let unset = |name: &str| env::raw(name).is_none();
        command.envs(chosen(&self.variables, unset));
    }
}

fn variables(interface: Option<&str>, folder: Option<&Path>) -> Vec<Variable> {
    let mut variables: Vec<Variable> = Vec::new();
    if let Some(interface) = interface {
        variables.push(("NCCL_SOCKET_IFNAME", &[], format!("={interface}")));
    }
    for (name, value) in [
        ("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "120"),
        ("TORCH_NCCL_ENABLE_MONITORING", "1"),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
        ("TORCH_NCCL_COORD_CHECK_MILSEC", "200"),
    ] {
        variables.push((name, &[], value.to_owned()));
    }
    variables.extend(BUFFER.iter().map(|name| (*name, BUFFER, "2000".to_owned())));
    if let Some(folder) = folder.and_then(Path::to_str) {
        variables.push(("TORCH_NCCL_DEBUG_INFO_PIPE_FILE", &[], format!("{folder}/ask-")));
        variables.extend(FILE.iter().map(|name| (*name, FILE, format!("{folder}/trace-"))));
    }
    variables
}

/// Those whose setting has no value yet, under none of its names.
fn chosen(variables: &[Variable], unset: impl Fn(&str) -> bool) -> impl Iterator<Item = (&'static str, &str)> {
    let free = move |(name, others, _): &&Variable| unset(name) && others.iter().all(|other| unset(other));
    variables.iter().filter(free).map(|(name, _, value)| (*name, value.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_users_own_value_stays_under_each_of_its_names() {
        let variables = variables(Some("ens5"), Some(Path::new("/t")));
        let names = |given: &[&str]| -> Vec<&str> {
            chosen(&variables, |name| !given.contains(&name)).map(|(name, _)| name).collect()
        };
        let all = names(&[]);
        assert_eq!(all.len(), 10, "{all:?}");
        assert!(names(&all).is_empty());
        let without =
            |given: &str| -> Vec<&str> { all.iter().copied().filter(|name| !names(&[given]).contains(name)).collect() };
        assert_eq!(without("NCCL_SOCKET_IFNAME"), ["NCCL_SOCKET_IFNAME"]);
        for pair in [BUFFER, FILE] {
            assert_eq!((without(pair[0]), without(pair[1])), (pair.to_vec(), pair.to_vec()));
        }
    }

    #[test]
    fn the_header_names_every_variable_and_its_value() {
        let header = include_str!("collectives.rs");
        let header: Vec<&str> = header.lines().take_while(|line| line.starts_with("//!")).collect();
        let of = |interface, folder| -> Vec<(&'static str, String)> {
            variables(interface, folder).into_iter().map(|(name, _, value)| (name, value)).collect()
        };
        for (name, value) in of(Some("ens5"), Some(Path::new("/t"))) {
            let row = header.iter().find(|line| line.contains(&format!("`{name}`"))).expect(name);
            assert!(value.starts_with(['=', '/']) || row.contains(&format!("| {value} |")), "{row}");
        }
        let (bare, told) = (of(None, None), of(Some("ens5"), Some(Path::new("/t"))));
        assert_eq!((bare.len(), told[0].1.as_str()), (6, "=ens5"));
        assert!(told.contains(&("TORCH_NCCL_DEBUG_INFO_PIPE_FILE", "/t/ask-".to_owned())));
        assert!(told.contains(&("TORCH_FR_DUMP_TEMP_FILE", "/t/trace-".to_owned())));
    }

    #[test]
    fn a_node_that_is_alone_tells_nothing_and_the_folder_goes_with_its_generation() {
        let mut command = Command::new("x");
        Collectives::default().tell(&mut command);
        assert_eq!(command.get_envs().count(), 0);
        let collectives = Collectives::on_gpus("127.0.0.1".parse().unwrap());
        collectives.tell(&mut command);
        let told: Vec<_> = command.get_envs().filter_map(|(name, value)| Some((name, value?.to_str()?))).collect();
        assert!(env::raw("NCCL_SOCKET_IFNAME").is_some() || told.contains(&("NCCL_SOCKET_IFNAME".as_ref(), "=lo")));
        let recorder = collectives.recorder().unwrap();
        let (folder, rank) = (recorder.folder.clone(), Rank(12));
        // As LibTorch makes the names: a stem, the rank, `.pipe`.
        assert_eq!(recorder.pipe(rank).to_str().unwrap(), format!("{}/ask-12.pipe", folder.display()));
        assert_eq!(recorder.trace(rank).to_str().unwrap(), format!("{}/trace-12", folder.display()));
        assert!(folder.is_dir());
        drop(collectives);
        assert!(!folder.exists());
    }
}
