//! Progress of a run as Kubeflow Trainer shows it in its TrainJob.
//!
//! Where its feature gate `TrainJobStatus` is on (Trainer 2.2), the controller gives each pod an address, a
//! certificate and a token in files; the token is renewed, so it is read for each request. One node reports: the one
//! that leads. Protocol: KEP-2779 of kubeflow/trainer.

use std::{fs, path::PathBuf, time::Duration};

use jiff::Timestamp;
use reqwest::{Certificate, Client, redirect};
use serde_json::{Value, json};
use url::Url;

use crate::{cloud::sqs::is_loopback, env, report::Event};

const URL: &str = "KUBEFLOW_TRAINER_SERVER_URL";
const CERTIFICATE: &str = "KUBEFLOW_TRAINER_SERVER_CA_CERT";
const TOKEN: &str = "KUBEFLOW_TRAINER_SERVER_TOKEN";
/// The limit for one request.
const REQUEST: Duration = Duration::from_secs(10);
/// The share of the newest step in the mean time of a step.
const NEWEST: f64 = 0.1;

/// How far a run is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    total: u64,
    step: u64,
    step_s: Option<f64>,
    figures: Vec<(&'static str, f64)>,
    held_out: Option<f64>,
    follows: bool,
    done: bool,
}

impl Progress {
    /// Takes in an event; whether there is something new to report.
    pub fn hear(&mut self, event: &Event) -> bool {
        match event {
            Event::Formed { total_steps, resume_step, leader, .. } => {
                (self.total, self.follows) = (*total_steps, leader.is_some());
                self.step = resume_step.map_or(0, |step| step.get());
            }
            Event::Step { step, loss, lr, grad_norm, tokens_per_s, step_s, .. } => {
                self.step = step.get();
                self.step_s = Some(self.step_s.map_or(*step_s, |mean| mean + NEWEST * (step_s - mean)));
                let figures = [
                    ("loss", *loss),
                    ("learning_rate", *lr),
                    ("grad_norm", *grad_norm),
                    ("tokens_per_s", *tokens_per_s),
                ];
                self.figures = figures.into_iter().filter(|(_, value)| value.is_finite()).collect();
            }
            Event::Validation { loss, .. } => self.held_out = Some(*loss).filter(|loss| loss.is_finite()),
            Event::Completed { .. } => self.done = true,
            _ => return false,
        }
        !self.follows
    }

    fn status(&self, now: Timestamp) -> Value {
        // 100 is the word of a run that is complete.
        let percent = if self.done { 100 } else { (100 * self.step).checked_div(self.total).unwrap_or(0).min(99) };
        let left = self.step_s.map(|mean| {
            let left = if self.done { 0.0 } else { mean * self.total.saturating_sub(self.step) as f64 };
            left.round() as u64
        });
        let steps = [("current_step", self.step as f64), ("total_steps", self.total as f64)];
        let all =
            steps.into_iter().chain(self.figures.iter().copied()).chain(self.held_out.map(|loss| ("eval_loss", loss)));
        let metrics: Vec<Value> = all.map(|(name, value)| json!({"name": name, "value": value.to_string()})).collect();
        let mut status = json!({"progressPercentage": percent, "metrics": metrics, "lastUpdatedTime": now});
        if let Some(left) = left {
            status["estimatedRemainingSeconds"] = left.into();
        }
        json!({ "trainerStatus": status })
    }
}

/// Where progress is reported.
#[derive(Clone, Debug)]
pub struct Server {
    url: Url,
    token: PathBuf,
    client: Client,
}

impl Server {
    /// As the controller says in the environment; `None`: this is no such pod. What is wrong with it is no error of the
    /// run.
    pub fn of_environment() -> Option<Self> {
        let url = env::text(URL)?;
        match Self::at(&url, env::text(CERTIFICATE).map(PathBuf::from), env::text(TOKEN).map(PathBuf::from)) {
            Ok(server) => Some(server),
            Err(why) => {
                tracing::warn!("progress is not reported to Kubeflow: {why}");
                None
            }
        }
    }

    fn at(url: &str, certificate: Option<PathBuf>, token: Option<PathBuf>) -> Result<Self, String> {
        let url = Url::parse(url).map_err(|error| format!("{URL}: {error}"))?;
        let local = is_loopback(&url);
        if url.scheme() != "https" && !local {
            return Err(format!("{URL} is not https: the token would be readable on the way"));
        }
        let token = token.ok_or_else(|| format!("{TOKEN} is not set"))?;
        let mut client = Client::builder().redirect(redirect::Policy::none()).timeout(REQUEST);
        if local {
            client = client.no_proxy();
        }
        if let Some(file) = certificate {
            let pem = fs::read(&file).map_err(|error| format!("{}: {error}", file.display()))?;
            let certificate = Certificate::from_pem(&pem).map_err(|error| format!("{}: {error}", file.display()))?;
            client = client.add_root_certificate(certificate);
        }
        Ok(Self { url, token, client: client.build().map_err(|error| error.to_string())? })
    }

    /// One attempt.
    pub async fn report(&self, progress: &Progress) -> Result<(), String> {
        let token = fs::read_to_string(&self.token).map_err(|error| format!("{}: {error}", self.token.display()))?;
        let body = progress.status(Timestamp::now()).to_string();
        let request = self.client.post(self.url.clone()).bearer_auth(token.trim());
        let request = request.header(reqwest::header::CONTENT_TYPE, "application/json").body(body);
        match request.send().await.map(|answer| answer.status()) {
            Ok(status) if status.is_success() => Ok(()),
            Ok(status) => Err(format!("status {}", status.as_u16())),
            Err(error) => Err(error.without_url().to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Generation, Step, WorldSize};

    fn formed(leader: Option<&str>) -> Event {
        Event::Formed {
            generation: Generation(2),
            world_size: WorldSize(4),
            resume_step: Some(Step(40)),
            total_steps: 200,
            shares: None,
            nodes: Some(2),
            leader: leader.map(str::to_owned),
        }
    }

    fn step(step: u64, loss: f64, step_s: f64) -> Event {
        Event::Step {
            step: Step(step),
            loss,
            lr: 1e-3,
            grad_norm: f64::NAN,
            tokens: 1,
            tokens_per_s: 128.0,
            step_s,
            stall_s: 0.0,
            lag_steps: 0,
            lag_s: 0.0,
            spent: None,
        }
    }

    #[test]
    fn a_status_has_percent_time_left_and_figures_that_are_numbers() {
        let mut progress = Progress::default();
        assert!(progress.hear(&formed(None)));
        let at = Timestamp::UNIX_EPOCH;
        let status = progress.status(at)["trainerStatus"].take();
        assert_eq!((&status["progressPercentage"], status.get("estimatedRemainingSeconds")), (&json!(20), None));
        assert!(progress.hear(&step(41, 2.5, 1.0)) && progress.hear(&step(100, 2.25, 2.0)));
        assert!(progress.hear(&Event::Validation { step: Step(100), loss: 3.0, sources: [].into() }));
        let expected = json!({"trainerStatus": {
            "progressPercentage": 50, "estimatedRemainingSeconds": 110, "lastUpdatedTime": "1970-01-01T00:00:00Z",
            "metrics": [
                {"name": "current_step", "value": "100"}, {"name": "total_steps", "value": "200"},
                {"name": "loss", "value": "2.25"}, {"name": "learning_rate", "value": "0.001"},
                {"name": "tokens_per_s", "value": "128"}, {"name": "eval_loss", "value": "3"}]}});
        assert_eq!(progress.status(at), expected);
        progress.hear(&step(200, 2.0, 1.0));
        assert_eq!(progress.status(at)["trainerStatus"]["progressPercentage"], 99, "its last step is not durable yet");
        progress.hear(&Event::Completed { step: Step(200), loss: None, early: None });
        let status = progress.status(at)["trainerStatus"].take();
        assert_eq!((&status["progressPercentage"], &status["estimatedRemainingSeconds"]), (&json!(100), &json!(0)));
        // A node that follows another one is silent.
        assert!(!progress.hear(&formed(Some("n-2"))) && !progress.hear(&step(101, 1.0, 1.0)));
    }

    #[test]
    fn a_token_goes_nowhere_unencrypted() {
        let token = Some(PathBuf::from("/token"));
        assert!(Server::at("https://controller:8443/x", None, token.clone()).is_ok());
        assert!(Server::at("http://127.0.0.1:1/x", None, token.clone()).is_ok());
        for (url, certificate, token, says) in [
            ("http://controller/x", None, token.clone(), "https"),
            ("controller", None, token.clone(), URL),
            ("https://controller/x", None, None, TOKEN),
            ("https://controller/x", Some(PathBuf::from("/none/ca.crt")), token, "/none/ca.crt"),
        ] {
            let error = Server::at(url, certificate, token).unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
