//! Nodes with a network of their own: real processes on machines that can be cut off, unplugged, slowed down, and sent
//! a notice, each for itself.
//!
//! `net` makes the machines, `faults` says how they are broken. `bench` proves with plain sockets that each fault does
//! what its name says; `single` runs the program on these machines, one node a run, `group` and `cuts` several nodes of
//! one run.
mod bench;
mod cuts;
mod faults;
mod group;
mod net;
mod single;

use crate::support::{lab::Lab, trainer::Trainer};

use self::{
    faults::STORE,
    net::{Network, on_network},
};

/// A lab whose store the nodes of a network reach over it.
///
/// Commands of the lab itself reach the same store from outside, whatever happens to the network.
struct Site<'a> {
    network: &'a Network,
    lab: Lab,
    /// The store as the nodes reach it.
    endpoint: String,
}

impl<'a> Site<'a> {
    fn new(network: &'a Network) -> Self {
        let lab = Lab::on_s3();
        let endpoint = lab.server().serve_also(network.place(STORE).listen_for_store());
        Self { network, lab, endpoint }
    }
    /// A command of the lab on this node.
    fn on(&self, node: usize, command: Trainer) -> Trainer {
        let command = command.envs(&[("AWS_ENDPOINT_URL", self.endpoint.clone())]);
        self.network.place(node).trainer(command, &self.lab.path(""))
    }
}
