//! What a tensor of the state can be to its parameter: a table, and everything that depends on a role reads it.
//!
//! How a role's elements are spread over the ranks is the strategy's choice: see [`super::Row`].

use crate::{
    layout,
    snapshot::plan::{Dtype, ShardKind},
};

/// What a tensor of the state is to its parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Its values, in the type that the model computes with or casts from.
    Weight,
    /// Its fp32 values, where [`Role::Weight`] has them rounded.
    Master,
    /// The mean of its gradients.
    ExpAvg,
    /// The mean of their squares.
    ExpAvgSq,
}

/// What is true of a role under every strategy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// The prefix of the parameter's name in files.
    pub prefix: &'static str,
    /// The file that it goes into.
    pub file: ShardKind,
    /// The element types that it may be stored in.
    pub dtypes: &'static [Dtype],
    /// Its elements are values of the parameter, so that a model folder fills it; others start at zero then.
    pub is_value: bool,
    /// A frozen parameter has it, too.
    pub of_frozen: bool,
}

impl Role {
    /// Every role. A name in a file is that of the first role whose prefix fits and whose parameter exists.
    pub const ALL: &[Self] = &[Self::Weight, Self::Master, Self::ExpAvg, Self::ExpAvgSq];

    /// Its row of the table.
    pub const fn traits(self) -> Traits {
        let trained =
            Traits { prefix: "", file: ShardKind::Optimizer, dtypes: &[Dtype::F32], is_value: false, of_frozen: false };
        match self {
            Self::Weight => Traits {
                file: ShardKind::Model,
                dtypes: &[Dtype::F32, Dtype::BF16],
                is_value: true,
                of_frozen: true,
                ..trained
            },
            Self::Master => Traits { prefix: layout::MASTER, is_value: true, ..trained },
            Self::ExpAvg => Traits { prefix: "exp_avg.", ..trained },
            Self::ExpAvgSq => Traits { prefix: "exp_avg_sq.", ..trained },
        }
    }

    /// The name in files of this role's tensor of the parameter `name`.
    pub fn name_of(self, name: &str) -> String {
        format!("{}{name}", self.traits().prefix)
    }

    /// Whether a parameter has it: `trained` or frozen.
    pub const fn is_of(self, trained: bool) -> bool {
        trained || self.traits().of_frozen
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn roles_are_told_apart_by_their_prefixes() {
        let prefixes: HashSet<&str> = Role::ALL.iter().map(|role| role.traits().prefix).collect();
        assert_eq!(prefixes.len(), Role::ALL.len());
        let names: Vec<String> = Role::ALL.iter().map(|role| role.name_of("w")).collect();
        assert_eq!(names, ["w", "master.w", "exp_avg.w", "exp_avg_sq.w"]);
    }

    #[test]
    fn a_frozen_parameter_has_its_values_and_nothing_else() {
        let of = |trained| Role::ALL.iter().copied().filter(|role| role.is_of(trained)).collect::<Vec<_>>();
        assert_eq!(of(true), Role::ALL);
        assert_eq!(of(false), [Role::Weight]);
        for &role in Role::ALL {
            let model = role.traits().file == ShardKind::Model;
            assert_eq!(model, role == Role::Weight, "a model folder has nothing but weights");
            assert!(!model || role.traits().is_value);
        }
    }
}
