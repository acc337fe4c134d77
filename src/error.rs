//! Errors as the user sees them, and their exit codes.
//!
//! Each module has its own error enum and explains through [`Explain`] what a caller should do about it. At the edge of
//! the library any such error becomes an [`Error`], which `main` prints as one chain and maps to an exit code. The exit
//! codes are an API (supervisors restart on some and not on others): they are defined only here.

use std::fmt;

use crate::shortage::Shortage;

/// What to do about an error; decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The command line is wrong. Exit code 64.
    Usage,
    /// Stored data is damaged and nothing usable is left. Exit code 65.
    Data,
    /// The store, a cloud or a peer cannot be reached after retries. Exit code 69.
    Unavailable,
    /// A fault of this program. Exit code 70.
    Bug,
    /// Interrupted; a checkpoint of the last step is committed. Start again. Exit code 75.
    Interrupted,
    /// Interrupted, and steps were lost (the journal says how many). Start again. Exit code 76.
    InterruptedWithLoss,
    /// The store or the system refused for lack of permission. Exit code 77.
    Permission,
    /// The configuration, or something that it names, is wrong. Exit code 78.
    Config,
    /// Another writer has this run. Exit code 79.
    Fenced,
    /// The run has reached a cap: it goes on with a higher one, and with nothing else. Exit code 80.
    Capped,
    /// The run was started again and again, and no checkpoint came of it. Exit code 81.
    Fruitless,
}

impl Kind {
    /// The process exit code, as documented in the README.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Usage => 64,
            Self::Data => 65,
            Self::Unavailable => 69,
            Self::Bug => 70,
            Self::Interrupted => 75,
            Self::InterruptedWithLoss => 76,
            Self::Permission => 77,
            Self::Config => 78,
            Self::Fenced => 79,
            Self::Capped => 80,
            Self::Fruitless => 81,
        }
    }
}

/// Implemented by every module's error enum.
pub trait Explain: std::error::Error + Send + Sync + 'static {
    /// What to do about it.
    fn kind(&self) -> Kind;
    /// One sentence that says how to fix it, if known.
    fn hint(&self) -> Option<String> {
        None
    }
}

/// An error on its way to the user: kind, a chain of causes, and a hint.
///
/// Not a [`std::error::Error`] itself, so that any [`Explain`] converts into it with `?`.
pub struct Error {
    kind: Kind,
    hint: Option<String>,
    context: Vec<String>,
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// Shorthand for results that end at the user.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error with this text.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, hint: None, context: Vec::new(), source: message.into().into() }
    }

    /// Any other error, with the kind that the caller knows it has.
    pub fn from_source(kind: Kind, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { kind, hint: None, context: Vec::new(), source: source.into() }.heeding_shortage()
    }

    /// A system that lacks a resource is neither a bug nor a mistake: time, or the machine's administrator, can fix it.
    fn heeding_shortage(mut self) -> Self {
        let Some(shortage) = Shortage::of(&*self.source) else { return self };
        if matches!(self.kind, Kind::Usage | Kind::Data | Kind::Bug | Kind::Config | Kind::Permission) {
            self.kind = Kind::Unavailable;
        }
        if self.kind == Kind::Unavailable {
            self.hint = Some(shortage.hint().to_owned());
        }
        self
    }

    /// Adds or replaces the hint.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the operation, a verb phrase: "read manifest".
    #[must_use]
    pub fn context(mut self, doing: impl Into<String>) -> Self {
        self.context.push(doing.into());
        self
    }

    /// The same for an object that a configuration or a job names: if it is missing or malformed, the input that names
    /// it is wrong; a store that does not answer or refuses keeps its kind.
    #[must_use]
    pub fn as_config_error(mut self) -> Self {
        if !matches!(self.kind, Kind::Unavailable | Kind::Permission) {
            self.kind = Kind::Config;
        }
        self
    }

    /// What to do about it.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Whether an error of this type is among its causes.
    pub fn comes_of<E: std::error::Error + 'static>(&self) -> bool {
        self.cause::<E>().is_some()
    }

    /// The first error of this type among its causes.
    pub fn cause<E: std::error::Error + 'static>(&self) -> Option<&E> {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(&*self.source);
        while let Some(error) = cause {
            if let Some(found) = error.downcast_ref::<E>() {
                return Some(found);
            }
            cause = error.source();
        }
        None
    }

    /// How to fix it, if known.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }
}

impl<E: Explain> From<E> for Error {
    fn from(error: E) -> Self {
        let (kind, hint) = (error.kind(), error.hint());
        Self { kind, hint, context: Vec::new(), source: Box::new(error) }.heeding_shortage()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for doing in self.context.iter().rev() {
            write!(f, "{doing}: ")?;
        }
        write!(f, "{}", self.source)?;
        let mut said = self.source.to_string();
        let mut cause = self.source.source();
        while let Some(error) = cause {
            let text = error.to_string();
            // Some libraries repeat the cause in their own text: print it once.
            if !said.contains(&text) {
                write!(f, ": {text}")?;
                said = text;
            }
            cause = error.source();
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.kind)
    }
}

/// Adds context to a result whose error can become an [`Error`].
pub trait Context<T> {
    /// Adds the operation, a verb phrase: "read manifest".
    fn context(self, doing: impl Into<String>) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, doing: impl Into<String>) -> Result<T> {
        self.map_err(|error| error.into().context(doing))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("open file")]
    struct Inner(#[source] std::io::Error);
    impl Explain for Inner {
        fn kind(&self) -> Kind {
            Kind::Config
        }
        fn hint(&self) -> Option<String> {
            Some("check the path".into())
        }
    }

    #[test]
    fn the_chain_reads_from_outside_in_without_repetition() {
        let inner = Inner(std::io::Error::new(std::io::ErrorKind::NotFound, "no such file"));
        let error = Error::from(inner).context("read model").context("start run");
        assert_eq!(error.to_string(), "start run: read model: open file: no such file");
        assert_eq!((error.kind(), error.hint()), (Kind::Config, Some("check the path")));
    }

    #[test]
    fn a_system_that_is_short_of_something_is_neither_a_bug_nor_a_mistake() {
        for number in [11, 12, 23, 24, 27, 28] {
            let source = || std::io::Error::from_raw_os_error(number);
            for kind in [Kind::Bug, Kind::Config, Kind::Data, Kind::Usage, Kind::Permission, Kind::Unavailable] {
                let error = Error::from_source(kind, source());
                assert_eq!(error.kind(), Kind::Unavailable, "{number}: {error:?}");
                assert!(error.hint().unwrap().contains("start again"), "{number}");
            }
            let error = Error::from(Inner(source()));
            assert_eq!(error.kind(), Kind::Unavailable, "{error:?}");
            assert!(error.hint().unwrap().contains("start again"), "{number}");
        }
        let error = Error::from_source(Kind::Bug, std::io::Error::from_raw_os_error(2));
        assert_eq!((error.kind(), error.hint()), (Kind::Bug, None));
    }

    #[test]
    fn a_missing_object_is_a_mistake_only_if_the_store_answers() {
        for (kind, named) in [
            (Kind::Unavailable, Kind::Unavailable),
            (Kind::Permission, Kind::Permission),
            (Kind::Data, Kind::Config),
            (Kind::Config, Kind::Config),
        ] {
            assert_eq!(Error::new(kind, "x").as_config_error().kind(), named);
        }
    }

    #[test]
    fn exit_codes_are_an_api() {
        let all = [
            (Kind::Usage, 64),
            (Kind::Data, 65),
            (Kind::Unavailable, 69),
            (Kind::Bug, 70),
            (Kind::Interrupted, 75),
            (Kind::InterruptedWithLoss, 76),
            (Kind::Permission, 77),
            (Kind::Config, 78),
            (Kind::Fenced, 79),
            (Kind::Capped, 80),
            (Kind::Fruitless, 81),
        ];
        for (kind, code) in all {
            assert_eq!(kind.exit_code(), code);
        }
    }
}
