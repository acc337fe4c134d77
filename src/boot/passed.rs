//! Parameters that become variables of the environment, for programs and libraries that read them there: proxies,
//! `HF_TOKEN`, `NCCL_*`, the keys of a program's own task.
//!
//! Only those that are asked for by name or prefix. What the environment has already wins, as everywhere. Names that
//! change which code runs, or our own settings, are refused. The variables are set by starting this program anew in
//! its own place ([`start_anew`]): an environment can't be changed while threads run. The new one finds all of them
//! set, and goes on. Values are never logged. Workers inherit what they inherit of any environment
//! (`workload/inherited.rs`).
//!
//! *Crash, retry:* nothing has begun by then. *Cancel:* a request to stop that came before is obeyed first; one that
//! comes in the very moment of the change ends the process, as it would end any program before its first instruction.

use std::{fmt, os::unix::process::CommandExt, process::Command, str::FromStr};

use crate::{
    cloud::ssm::{Parameter, Secret},
    error::{Error, Kind, Result},
    report,
};

/// Whose values decide which code runs, or are settings of ours, which have parameters of their own.
const REFUSED: [&str; 4] = ["PATH", "LD_*", "GLIBC_TUNABLES", "TRAINER_*"];

/// A name, or the beginning of names: `HF_TOKEN`, `NCCL_*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

/// Why a text is no [`Pattern`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPattern {
    /// Not a name.
    #[error("expected the name of a variable, or a beginning and \"*\", such as HF_TOKEN or NCCL_*")]
    Form,
    /// One that is refused.
    #[error("{0} may not come from a parameter: it decides which program runs, or has a parameter of its own")]
    Refused(String),
}

impl Pattern {
    /// Whether this name is meant.
    pub fn fits(&self, name: &str) -> bool {
        match self.0.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == self.0,
        }
    }
}

impl FromStr for Pattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, InvalidPattern> {
        let name = text.strip_suffix('*').unwrap_or(text);
        if !is_name(name) {
            return Err(InvalidPattern::Form);
        }
        if is_refused(name) || is_refused(text) {
            return Err(InvalidPattern::Refused(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_name(text: &str) -> bool {
    let is_inner = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    !text.is_empty() && !text.as_bytes()[0].is_ascii_digit() && text.bytes().all(is_inner)
}

fn is_refused(name: &str) -> bool {
    REFUSED.iter().any(|refused| Pattern((*refused).to_owned()).fits(name) || *refused == name)
}

/// The variables to set: the parameters that a pattern names and that the environment does not have (`is_set`).
///
/// # Errors
/// On a parameter that fits a pattern and may not be a variable.
pub fn choose(
    patterns: &[Pattern],
    parameters: &[Parameter],
    is_set: &dyn Fn(&str) -> bool,
) -> Result<Vec<(String, Secret)>> {
    let mut chosen = Vec::new();
    for Parameter { name, value } in parameters {
        if !patterns.iter().any(|pattern| pattern.fits(name)) {
            continue;
        }
        let wrong = |why: &str| Err(Error::new(Kind::Config, format!("parameter {name} can't be a variable: {why}")));
        if is_refused(name) {
            return wrong("it decides which program runs, or is a setting of trainer's, which has its own parameter");
        }
        if !is_name(name) {
            return wrong("a variable's name has letters, digits and \"_\" only");
        }
        if value.reveal().contains('\0') {
            return wrong("its value holds a NUL");
        }
        if is_set(name) {
            tracing::debug!("{name} is in the environment already, which wins over the parameter");
        } else {
            chosen.push((name.clone(), value.clone()));
        }
    }
    Ok(chosen)
}

/// Starts this program anew in this very process, with these variables and the same arguments; returns only if that
/// fails.
pub fn start_anew(variables: &[(String, Secret)]) -> Error {
    let names: Vec<&str> = variables.iter().map(|(name, _)| name.as_str()).collect();
    tracing::info!("boot: {} from parameters: starting anew with them", names.join(", "));
    let failed = |error| Error::from_source(Kind::Bug, error).context("start anew with variables from parameters");
    let program = match std::env::current_exe() {
        Ok(program) => program,
        Err(error) => return failed(error),
    };
    let mut command = Command::new(program);
    command.args(std::env::args_os().skip(1));
    command.envs(variables.iter().map(|(name, value)| (name, value.reveal())));
    // What has been said is on its way by a thread that would be gone.
    report::flush();
    failed(command.exec())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(names: &[&str]) -> Vec<Parameter> {
        names.iter().map(|name| Parameter { name: (*name).into(), value: Secret::new("hunter2") }).collect()
    }

    fn patterns(texts: &[&str]) -> Vec<Pattern> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn only_what_is_asked_for_is_passed_on_and_the_environment_wins() {
        let all = parameters(&["HF_TOKEN", "NCCL_DEBUG", "NCCL_IB_HCA", "OPENAI_API_KEY", "store", "set/a.b"]);
        let chosen = |texts: &[&str]| -> Vec<String> {
            let chosen = choose(&patterns(texts), &all, &|name| name == "NCCL_DEBUG").unwrap();
            chosen.into_iter().map(|(name, _)| name).collect()
        };
        assert!(chosen(&[]).is_empty());
        assert_eq!(chosen(&["HF_TOKEN", "NCCL_*"]), ["HF_TOKEN", "NCCL_IB_HCA"]);
        assert_eq!(chosen(&["OPENAI_API_KEY"]), ["OPENAI_API_KEY"]);
        assert!(chosen(&["HF_TOK"]).is_empty());
        let value = choose(&patterns(&["HF_*"]), &all, &|_| false).unwrap();
        assert!(!format!("{value:?}").contains("hunter2"));
    }

    #[test]
    fn nothing_that_decides_which_code_runs_comes_from_a_parameter() {
        for text in ["PATH", "LD_PRELOAD", "LD_*", "LD_LIB*", "TRAINER_STORE", "TRAINER_*", "GLIBC_TUNABLES"] {
            assert_eq!(text.parse::<Pattern>(), Err(InvalidPattern::Refused(text.into())), "{text}");
        }
        for text in ["", "*", "1A", "A-B", "A=B", "A B", "A*B", "**"] {
            assert_eq!(text.parse::<Pattern>(), Err(InvalidPattern::Form), "{text}");
        }
        // A beginning that covers more than is said.
        for (text, name) in
            [("P*", "PATH"), ("L*", "LD_PRELOAD"), ("T*", "TRAINER_FAULTS"), ("A*", "A/B"), ("A*", "A-B")]
        {
            let error = choose(&patterns(&[text]), &parameters(&[name]), &|_| false).unwrap_err();
            assert!(error.kind() == Kind::Config && error.to_string().contains(name), "{error}");
            assert!(!error.to_string().contains("hunter2"));
        }
        let nul = [Parameter { name: "A".into(), value: Secret::new("a\0b") }];
        assert!(choose(&patterns(&["A"]), &nul, &|_| false).is_err());
    }
}
