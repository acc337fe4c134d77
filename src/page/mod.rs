//! A run as one HTML file, for a browser that has no network: no script, no font, no picture from elsewhere.
//!
//! The page is a pure function of a journal, figures and prices: the same input makes the same bytes. Everything from
//! outside (ids, reasons, names of figures, text of notices) is text in it and never markup: only words of this program
//! are written as they are (`html`). A policy in the page's head forbids all else: scripts, requests, forms, and every
//! style but its own, which it names by its checksum.
//!
//! Curves are thinned to a few thousand points that keep each minimum and maximum, and lists to their newest entries:
//! the page of a run of a million steps is below 5 MB. Each chart has its figures as a table beside it.
//!
//! Nothing is stored here, so there is nothing to crash, retry or cancel.
#![doc = include_str!("README.md")]
mod charts;
mod decimate;
mod head;
mod html;
mod sections;
mod svg;

use self::{
    charts::Marks,
    html::{Html, Value},
};
use crate::{
    history::{
        account::Account,
        cost::{Bill, Prediction},
        episodes::Episode,
    },
    journal::RunState,
    metrics::Series,
};

/// What a report is made of.
pub struct Input<'a> {
    /// The run.
    pub state: &'a RunState,
    /// Its store, as it was named.
    pub store: &'a str,
    /// Where its time went.
    pub account: &'a Account,
    /// Its interruptions.
    pub episodes: &'a [Episode<'a>],
    /// The figures of its steps, each step once.
    pub curve: &'a Series,
    /// What it cost; `None`: no price is known.
    pub bill: Option<&'a Bill>,
    /// What the model expected; `None`: there is nothing to expect it from.
    pub prediction: Option<&'a Prediction>,
    /// Files of figures that can't be read.
    pub broken: &'a [String],
}

/// The page.
pub fn render(input: &Input<'_>) -> String {
    let mut page = Html::default();
    page.raw("<!DOCTYPE html>\n<html lang=\"en\">\n");
    head::write(&mut page, input);
    page.raw("<body>\n");
    let marks = marks(input);
    let mut body = Html::default();
    sections::summary(&mut body, input);
    body.open("main", &[]);
    let parts: [(&'static str, &str, Html); 8] = [
        ("loss", "Loss", sections::loss(input, &marks)),
        ("time", "Where the time went", sections::time(input)),
        ("lag", "Durable lag", sections::lag(input)),
        ("interruptions", "Interruptions", sections::interruptions(input)),
        ("machines", "Machines and their lives", sections::machines(input)),
        ("cost", "Cost", sections::cost(input)),
        ("checkpoints", "Checkpoints", sections::checkpoints(input)),
        ("sources", "Sources", sections::sources(input)),
    ];
    for (id, title, part) in parts {
        let heading = format!("{id}-heading");
        body.open("section", &[("id", id.into()), ("aria-labelledby", heading.as_str().into())]);
        body.open("h2", &[("id", heading.as_str().into())]).text(title).close("h2");
        body.add(&part).close("section");
    }
    body.close("main");
    page.add(&body).raw("</body>\n</html>\n");
    page.into_string()
}

/// Where the run was interrupted and went on.
fn marks(input: &Input<'_>) -> Marks {
    let mut marks = Marks::default();
    for formed in input.state.formations() {
        marks.resumed.extend(formed.resume.as_ref().map(|point| (formed.generation, point.step)));
    }
    marks.interrupted = input.episodes.iter().filter_map(|episode| episode.step.or(episode.checkpoint)).collect();
    marks
}

/// An attribute's list with one class.
const fn class(name: &'static str) -> [(&'static str, Value<'static>); 1] {
    [("class", Value::Text(name))]
}

#[cfg(test)]
mod tests;
