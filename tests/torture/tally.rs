//! The counts of a campaign.

use std::{collections::BTreeMap, fmt, time::Duration};

use super::plan::Action;

/// Counts, added up over scenarios.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Scenarios that were played to their end.
    pub scenarios: u64,
    /// Agents that were started.
    pub lives: u64,
    /// Generations that continued from a checkpoint.
    pub resumes: u64,
    /// Agents that exited with 79.
    pub fenced: u64,
    /// Generations of groups.
    pub generations: u64,
    /// Checkpoints that groups have committed.
    pub commits: u64,
    /// Agents of groups that were told to leave, and left.
    pub left: u64,
    /// Agents of groups that were stopped, and woke.
    pub sleepers: u64,
    /// The longest time in which no agent of a group said a word.
    pub silence: Duration,
    /// SIGKILLs that struck, by target: `agent`, `worker`, `both`, or the name of a crash point.
    kills: BTreeMap<&'static str, u64>,
    /// Panics and errors at crash points.
    others: BTreeMap<String, u64>,
    /// Agents that noticed that their machine garbles, or that their store's disk is gone, and exited.
    machines: BTreeMap<&'static str, u64>,
    /// Requests that the store broke.
    faults: BTreeMap<&'static str, u64>,
    /// Steps that were reported and repeated: deaths, sum, most.
    lost: (u64, u64, u64),
}

impl Tally {
    /// Processes, or groups of them, that died of SIGKILL.
    pub fn kills(&self) -> u64 {
        self.kills.values().sum()
    }
    /// The number of these that struck `whom`.
    pub fn kills_of(&self, whom: &str) -> u64 {
        self.kills.get(whom).copied().unwrap_or_default()
    }
    /// Requests of the store that were broken in this way.
    pub fn faults_of(&self, kind: &str) -> u64 {
        self.faults.get(kind).copied().unwrap_or_default()
    }
    /// Agents that exited because of this fault of their machine.
    pub fn machines_of(&self, fault: &str) -> u64 {
        self.machines.get(fault).copied().unwrap_or_default()
    }
    /// Counts an agent that exited because of a fault of its machine.
    pub fn machine(&mut self, fault: &'static str, times: u64) {
        if times > 0 {
            *self.machines.entry(fault).or_default() += times;
        }
    }
    /// Counts SIGKILLs.
    pub fn kill(&mut self, whom: &'static str, times: u64) {
        if times > 0 {
            *self.kills.entry(whom).or_default() += times;
        }
    }
    /// Counts a crash point with another effect than a kill.
    pub fn point(&mut self, name: &'static str, action: Action, times: u64) {
        if times > 0 {
            *self.others.entry(format!("{name} ({action})")).or_default() += times;
        }
    }
    /// Counts the cost of a death.
    pub fn lost_steps(&mut self, steps: u64) {
        let (deaths, sum, most) = self.lost;
        self.lost = (deaths + 1, sum + steps, most.max(steps));
    }
    /// Counts the proxy's faults.
    pub fn store_faults(&mut self, faults: BTreeMap<&'static str, u64>) {
        for (kind, times) in faults {
            *self.faults.entry(kind).or_default() += times;
        }
    }
    /// Adds another tally.
    pub fn add(&mut self, other: Self) {
        self.scenarios += other.scenarios;
        self.lives += other.lives;
        self.resumes += other.resumes;
        self.fenced += other.fenced;
        self.generations += other.generations;
        self.commits += other.commits;
        self.left += other.left;
        self.sleepers += other.sleepers;
        self.silence = self.silence.max(other.silence);
        other.kills.into_iter().for_each(|(whom, times)| self.kill(whom, times));
        other.others.into_iter().for_each(|(what, times)| *self.others.entry(what).or_default() += times);
        other.machines.into_iter().for_each(|(fault, times)| self.machine(fault, times));
        self.store_faults(other.faults);
        let (deaths, sum, most) = other.lost;
        self.lost = (self.lost.0 + deaths, self.lost.1 + sum, self.lost.2.max(most));
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, value: String| writeln!(f, "  {name:<34} {value:>8}");
        row("kills", self.kills().to_string())?;
        for (whom, times) in &self.kills {
            row(&format!("  {whom}"), times.to_string())?;
        }
        for (what, times) in &self.others {
            row(&format!("other crashes: {what}"), times.to_string())?;
        }
        row("faults of machines", self.machines.values().sum::<u64>().to_string())?;
        for (fault, times) in &self.machines {
            row(&format!("  {fault}"), times.to_string())?;
        }
        row("store faults", self.faults.values().sum::<u64>().to_string())?;
        for (kind, times) in &self.faults {
            row(&format!("  {kind}"), times.to_string())?;
        }
        row("runs", self.scenarios.to_string())?;
        row("agents started", self.lives.to_string())?;
        row("resumes from a checkpoint", self.resumes.to_string())?;
        row("fenced writers", self.fenced.to_string())?;
        if self.generations > 0 {
            row("generations", self.generations.to_string())?;
            row("commits", self.commits.to_string())?;
            row("agents that left when told", self.left.to_string())?;
            row("agents that slept and woke", self.sleepers.to_string())?;
            row("longest silence, s", format!("{:.1}", self.silence.as_secs_f64()))?;
        }
        let (deaths, sum, most) = self.lost;
        row("steps done again per killed agent", format!("{:.1}", sum as f64 / deaths.max(1) as f64))?;
        row("  at most", most.to_string())
    }
}
