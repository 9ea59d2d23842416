// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a scenario says: its gates, and in which order they are opened. docs/gates.md has the language.

use guest_protocol::{CASTS, Play, ScenarioPlan, SitePlan, WORKLOADS};
use serde::{Deserialize, Serialize};
use vgpu::gates::Role;
use vgpu_spec::gate::{PLACE_BYTES, SITES};

/// Longest scenario in bytes.
pub const MAX_BYTES: usize = 64 * 1024;
/// Heartbeats that a gate stays closed at the most, if the scenario does not say.
const LIMIT: u32 = 60;
/// Longest that it may say: from then on faults count as unanswered.
const MAX_LIMIT: u32 = 90;
/// The same where a deadlock may come of it: the watchdog, which then waits 90 in all, is not to take a task that is held for a deadlock.
const MAX_LIMIT_HANG: u32 = 75;
/// Repetitions, if the scenario does not say.
const REPETITIONS: u64 = 10;
/// Steps of a scenario at most.
const MAX_STEPS: usize = 256;

/// A scenario, as it is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Its name.
    pub name: String,
    /// One line.
    pub about: String,
    /// Who plays, of the protocol's casts; or one of the next two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cast: Option<String>,
    /// A workload, a round of which is played.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workload: Option<String>,
    /// A command, which is run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<String>,
    /// The backend that it is about; without, any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// Repetitions, if the command line does not say.
    #[serde(default = "repetitions")]
    pub repetitions: u64,
    /// Heartbeats that a gate stays closed at the most.
    #[serde(default = "limit")]
    pub limit: u32,
    /// A deadlock is to be expected: the watchdog has less patience.
    #[serde(default)]
    pub hang: bool,
    /// The gates.
    #[serde(default, rename = "gate")]
    pub gates: Vec<Gate>,
    /// What happens, in order.
    #[serde(default, rename = "step")]
    pub steps: Vec<Step>,
}

fn repetitions() -> u64 {
    REPETITIONS
}

fn limit() -> u32 {
    LIMIT
}

/// A gate, as it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gate {
    /// Its name in the steps.
    pub name: String,
    /// Where it is.
    pub at: String,
    /// Role of a task that has none when it comes there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gives: Option<String>,
    /// Only tasks of these roles are held there, even without a script.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub only: Option<Words>,
    /// Nobody waits there.
    #[serde(default)]
    pub record: bool,
    /// It need not exist; if it does not, steps about it count as done.
    #[serde(default)]
    pub optional: bool,
}

/// One or several.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Words {
    /// One.
    One(String),
    /// Several.
    Any(Vec<String>),
}

impl Words {
    fn all(&self) -> &[String] {
        match self {
            Self::One(word) => std::slice::from_ref(word),
            Self::Any(words) => words,
        }
    }
}

/// A step, as it is written: one of `wait`, `open`, `admit`, `pause`, `expect`, and perhaps `when`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Waits until one of these conditions holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<Words>,
    /// Opens a gate for the rest of the repetition.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open: Option<String>,
    /// Lets one task through.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admit: Option<String>,
    /// Heartbeats in which nothing is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause: Option<u64>,
    /// A condition that must hold now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expect: Option<String>,
    /// Only with one of these backends or policies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub when: Option<Words>,
}

/// A gate and, perhaps, whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// The gate's number.
    pub gate: usize,
    /// The role; without, any task.
    pub role: Option<Role>,
}

/// What can be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// A task waits there, or has come there if nobody waits at the gate.
    Reached(Place),
    /// A task has gone on from there.
    Passed(Place),
    /// A task of this role is asleep in the function with this number.
    Blocked(Role, usize),
    /// A task has this role no longer.
    Gone(Role),
}

/// What is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Waits for one of these.
    Wait(Vec<Condition>),
    /// Opens for good.
    Open(Place),
    /// Lets one through.
    Admit(Place),
    /// Lets so many heartbeats go by.
    Pause(u64),
    /// Must hold, or must not.
    Expect(Condition, bool),
}

/// A gate, or a watched function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Site {
    /// Its name.
    pub name: String,
    /// What the guest is told.
    pub plan: SitePlan,
    /// Nobody waits there.
    pub record: bool,
    /// Whom the steps let through: nobody, everybody, or these roles.
    pub concerns: Concerns,
    /// Who is held there at all, if not everybody.
    pub only: Vec<Role>,
}

/// Whose passing a gate's steps decide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Concerns {
    /// Nobody's: it is open.
    Nobody,
    /// That of tasks with one of these roles.
    Roles(Vec<Role>),
    /// Everybody's.
    All,
}

/// A scenario that can be followed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Script {
    /// Its sites, by number.
    pub sites: Vec<Site>,
    /// Its steps, and how each is written.
    pub steps: Vec<(Action, String)>,
}

impl Scenario {
    /// Begins one in Rust. What it plays is a cast.
    #[must_use]
    pub fn new(name: &str, cast: &str) -> Self {
        Self {
            name: name.into(),
            about: String::new(),
            cast: Some(cast.into()),
            workload: None,
            command: None,
            backend: None,
            repetitions: REPETITIONS,
            limit: LIMIT,
            hang: false,
            gates: Vec::new(),
            steps: Vec::new(),
        }
    }

    /// Adds a gate.
    #[must_use]
    pub fn gate(mut self, name: &str, at: &str) -> Self {
        self.gates.push(Gate { name: name.into(), at: at.into(), ..Gate::default() });
        self
    }

    /// Adds a gate that gives a role to tasks that have none.
    #[must_use]
    pub fn gate_giving(mut self, name: &str, at: &str, role: &str) -> Self {
        let gives = Some(role.into());
        self.gates.push(Gate { name: name.into(), at: at.into(), gives, ..Gate::default() });
        self
    }

    /// Waits for a condition.
    #[must_use]
    pub fn wait(mut self, condition: &str) -> Self {
        self.steps.push(Step { wait: Some(Words::One(condition.into())), ..Step::default() });
        self
    }

    /// Opens a gate.
    #[must_use]
    pub fn open(mut self, place: &str) -> Self {
        self.steps.push(Step { open: Some(place.into()), ..Step::default() });
        self
    }

    /// Lets one task through.
    #[must_use]
    pub fn admit(mut self, place: &str) -> Self {
        self.steps.push(Step { admit: Some(place.into()), ..Step::default() });
        self
    }

    /// Lets heartbeats go by.
    #[must_use]
    pub fn pause(mut self, heartbeats: u64) -> Self {
        self.steps.push(Step { pause: Some(heartbeats), ..Step::default() });
        self
    }

    /// A condition must hold, or, after `not `, must not.
    #[must_use]
    pub fn expect(mut self, condition: &str) -> Self {
        self.steps.push(Step { expect: Some(condition.into()), ..Step::default() });
        self
    }

    /// From TOML. What makes no sense is said with its place.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn parse(text: &str) -> Result<Self, String> {
        let scenario: Self = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        scenario.check()?;
        scenario.compile(&[])?;
        Ok(scenario)
    }

    fn check(&self) -> Result<(), String> {
        let word = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
        if self.name.is_empty() || self.name.len() > 64 || !self.name.chars().all(word) {
            return Err(format!("name: {:?} is not a word of letters, digits and -", self.name));
        }
        let most = if self.hang { MAX_LIMIT_HANG } else { MAX_LIMIT };
        if !(1..=most).contains(&self.limit) {
            return Err(format!("limit: {} is not within 1 and {most} heartbeats", self.limit));
        }
        if self.repetitions == 0 {
            return Err("repetitions: at least one".into());
        }
        let known = |names: Vec<&str>, what: &str, name: &str| {
            if names.contains(&name) {
                return Ok(());
            }
            Err(format!("{what}: there is no {name:?}; there are: {}", names.join(", ")))
        };
        match (&self.cast, &self.workload, &self.command) {
            (Some(name), None, None) => known(CASTS.iter().map(|c| c.name).collect(), "cast", name),
            (None, Some(name), None) => known(WORKLOADS.iter().map(|w| w.name).collect(), "workload", name),
            (None, None, Some(_)) => Ok(()),
            _ => Err("it has one of cast, workload and command".into()),
        }
    }

    fn play(&self) -> Play {
        match (&self.cast, &self.workload, &self.command) {
            (_, Some(name), _) => Play::Workload(name.clone()),
            (_, _, Some(command)) => Play::Command(command.clone()),
            (cast, ..) => Play::Cast(cast.clone().unwrap_or_default()),
        }
    }

    /// What the guest is told.
    #[must_use]
    pub fn plan(&self, script: &Script) -> ScenarioPlan {
        ScenarioPlan {
            play: self.play(),
            sites: script.sites.iter().map(|site| site.plan.clone()).collect(),
            limit: self.limit,
        }
    }

    /// Resolves names. `with` is what `when` is held against: the backend and the policy.
    ///
    /// # Errors
    /// What makes no sense, in words.
    pub fn compile(&self, with: &[&str]) -> Result<Script, String> {
        let mut sites = Vec::new();
        for gate in &self.gates {
            let at = |why: String| format!("gate {:?}: {why}", gate.name);
            if sites.iter().any(|site: &Site| site.name == gate.name) {
                return Err(at("there are two of that name".into()));
            }
            if gate.name.is_empty() || gate.name.contains(['@', ' ', ',']) {
                return Err(at("a name is one word, without @ and comma".into()));
            }
            let place = place(&gate.at).map_err(at)?;
            let gives = gate.gives.clone().unwrap_or_default();
            Role::new(&gives).ok_or_else(|| at(format!("gives: {gives:?} is longer than 15 bytes")))?;
            let only =
                gate.only.iter().flat_map(Words::all).map(|name| role(name)).collect::<Result<Vec<_>, _>>();
            let only = only.map_err(|why| at(format!("only: {why}")))?;
            let record = gate.record || place.starts_with("offset:");
            let (id, optional) = (sites.len() as u32, gate.optional);
            let plan = SitePlan { id, place, gives, record, watch: false, optional };
            sites.push(Site { name: gate.name.clone(), plan, record, concerns: Concerns::Nobody, only });
        }
        let mut script = Script { sites, steps: Vec::new() };
        if self.steps.len() > MAX_STEPS {
            return Err(format!("{} steps are more than {MAX_STEPS}", self.steps.len()));
        }
        for (index, step) in self.steps.iter().enumerate() {
            let compiled = script.step(step).map_err(|why| format!("step {}: {why}", index + 1))?;
            let holds = |when: &Words| when.all().iter().any(|word| with.contains(&word.as_str()));
            if step.when.as_ref().is_none_or(holds) {
                script.steps.push(compiled);
            }
        }
        script.concern();
        if script.sites.len() > SITES {
            return Err(format!("{} gates and functions are more than {SITES}", script.sites.len()));
        }
        Ok(script)
    }
}

/// A place as the witness takes it.
fn place(at: &str) -> Result<String, String> {
    let Some((sort, name)) = at.split_once(':') else {
        return Err(format!("at: {at:?} is not of the form entry:FUNCTION"));
    };
    let place = match sort {
        "driver" => format!("entry:hmm_gate_{name}"),
        "entry" | "return" | "user" | "offset" => at.to_owned(),
        _ => return Err(format!("at: {sort:?} is none of entry, return, driver, user, offset")),
    };
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c) || (sort == "offset" && c == '+');
    if name.is_empty() || !name.chars().all(plain) {
        return Err(format!("at: {name:?} is no name"));
    }
    if place.len() >= PLACE_BYTES || (sort == "user" && name.len() > 31) {
        return Err(format!("at: {name:?} is too long"));
    }
    Ok(place)
}

fn role(name: &str) -> Result<Role, String> {
    Role::new(name)
        .filter(|role| !role.is_empty())
        .ok_or_else(|| format!("{name:?} is no role: a word of at most 15 bytes"))
}

impl Script {
    fn place(&self, text: &str) -> Result<Place, String> {
        let (name, whose) = match text.split_once('@') {
            Some((name, whose)) => (name, Some(role(whose)?)),
            None => (text, None),
        };
        let gate = self.sites.iter().position(|site| site.name == name && !site.plan.watch);
        gate.map(|gate| Place { gate, role: whose }).ok_or_else(|| format!("there is no gate {name:?}"))
    }

    /// A function with a question mark behind it need not exist: nobody is asleep in it then.
    fn watched(&mut self, function: &str) -> Result<usize, String> {
        let (function, optional) = match function.strip_suffix('?') {
            Some(function) => (function, true),
            None => (function, false),
        };
        let known = self.sites.iter().position(|site| site.plan.watch && site.name == function);
        if let Some(known) = known {
            return Ok(known);
        }
        let plan = SitePlan {
            id: self.sites.len() as u32,
            place: place(&format!("entry:{function}"))?,
            watch: true,
            optional,
            ..SitePlan::default()
        };
        let (name, concerns, only) = (function.into(), Concerns::Nobody, Vec::new());
        self.sites.push(Site { name, plan, record: true, concerns, only });
        Ok(self.sites.len() - 1)
    }

    fn condition(&mut self, text: &str) -> Result<Condition, String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        match words[..] {
            ["reached", place] => Ok(Condition::Reached(self.place(place)?)),
            ["passed", place] => Ok(Condition::Passed(self.place(place)?)),
            ["blocked", who, "in", function] => Ok(Condition::Blocked(role(who)?, self.watched(function)?)),
            ["gone", who] => Ok(Condition::Gone(role(who)?)),
            _ => Err(format!(
                "{text:?} is none of: reached GATE[@ROLE], passed GATE[@ROLE], blocked ROLE in FUNCTION, gone ROLE"
            )),
        }
    }

    fn step(&mut self, step: &Step) -> Result<(Action, String), String> {
        let Step { wait, open, admit, pause, expect, when: _ } = step;
        match (wait, open, admit, pause, expect) {
            (Some(words), None, None, None, None) if !words.all().is_empty() => {
                let conditions = words.all().iter().map(|text| self.condition(text));
                let text = format!("wait {}", words.all().join(" or "));
                Ok((Action::Wait(conditions.collect::<Result<_, _>>()?), text))
            }
            (None, Some(place), None, None, None) => {
                Ok((Action::Open(self.closable(place)?), format!("open {place}")))
            }
            (None, None, Some(place), None, None) => {
                Ok((Action::Admit(self.closable(place)?), format!("admit {place}")))
            }
            (None, None, None, Some(beats), None) => Ok((Action::Pause(*beats), format!("pause {beats}"))),
            (None, None, None, None, Some(text)) => {
                let (condition, holds) = match text.strip_prefix("not ") {
                    Some(condition) => (condition, false),
                    None => (text.as_str(), true),
                };
                Ok((Action::Expect(self.condition(condition)?, holds), format!("expect {text}")))
            }
            _ => Err("a step has one of wait, open, admit, pause and expect".into()),
        }
    }

    fn closable(&self, text: &str) -> Result<Place, String> {
        let place = self.place(text)?;
        if self.sites[place.gate].record {
            return Err(format!("nobody waits at {text:?}: it is only recorded"));
        }
        Ok(place)
    }

    /// A gate holds those whom a step lets through, and nobody else.
    fn concern(&mut self) {
        for (action, _) in &self.steps {
            let (Action::Open(place) | Action::Admit(place)) = action else { continue };
            let Some(site) = self.sites.get_mut(place.gate) else { continue };
            match (&mut site.concerns, place.role) {
                (_, None) => site.concerns = Concerns::All,
                (Concerns::All, _) => {}
                (Concerns::Roles(roles), Some(role)) => roles.push(role),
                (concerns, Some(role)) => *concerns = Concerns::Roles(vec![role]),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        name = "x"
        about = "y"
        cast = "fault-and-drop"
        [[gate]]
        name = "a"
        at = "driver:looked"
        [[gate]]
        name = "b"
        at = "return:hmm_range_fault"
        gives = "fault"
        record = true
        [[step]]
        wait = ["reached a@A", "blocked B in down_write"]
        [[step]]
        open = "a@A"
        when = ["drop-lock", "srcu"]
        [[step]]
        expect = "not passed a"
    "#;

    #[test]
    fn a_script_resolves_its_names() {
        let scenario = Scenario::parse(GOOD).unwrap();
        let script = scenario.compile(&["mirror", "srcu"]).unwrap();
        assert_eq!(script.sites.len(), 3);
        assert_eq!(script.sites[0].plan.place, "entry:hmm_gate_looked");
        assert_eq!(script.sites[0].concerns, Concerns::Roles(vec![Role::new("A").unwrap()]));
        assert!(script.sites[2].plan.watch && script.sites[2].plan.place == "entry:down_write");
        let place = Place { gate: 0, role: Role::new("A") };
        assert_eq!(
            script.steps[0].0,
            Action::Wait(vec![Condition::Reached(place), Condition::Blocked(Role::new("B").unwrap(), 2)])
        );
        assert_eq!(script.steps[2].1, "expect not passed a");
        let other = scenario.compile(&["read-held"]).unwrap();
        assert_eq!((other.steps.len(), &other.sites[0].concerns), (2, &Concerns::Nobody));
        let plan = scenario.plan(&script);
        assert_eq!((plan.limit, plan.sites.len()), (LIMIT, 3));
        assert_eq!(plan.play, Play::Cast("fault-and-drop".into()));
    }

    #[test]
    fn what_makes_no_sense_is_said_with_its_place() {
        for (from, to, said) in [
            (
                "cast = \"fault-and-drop\"",
                "cast = \"nobody\"",
                "there is no \"nobody\"; there are: fault-and-drop",
            ),
            ("cast = \"fault-and-drop\"", "", "one of cast, workload and command"),
            ("driver:looked", "looked", "gate \"a\": at: \"looked\" is not of the form"),
            ("driver:looked", "somewhere:looked", "none of entry"),
            ("driver:looked", "entry:a b", "is no name"),
            ("record = true", "record = true\nonly = ['a-role-that-is-too-long']", "only: "),
            ("open = \"a@A\"", "open = \"c@A\"", "step 2: there is no gate \"c\""),
            ("open = \"a@A\"", "open = \"b\"", "step 2: nobody waits at \"b\""),
            ("open = \"a@A\"", "open = \"a@A\"\npause = 1", "step 2: a step has one of"),
            ("reached a@A", "arrived a@A", "step 1: \"arrived a@A\" is none of"),
            ("reached a@A", "reached a@a-role-that-is-too-long", "is no role"),
            ("name = \"b\"", "name = \"a\"", "two of that name"),
            ("about = \"y\"", "about = \"y\"\nlimit = 91", "limit: 91"),
            ("about = \"y\"", "about = \"y\"\nhang = true\nlimit = 76", "limit: 76"),
            ("about = \"y\"", "about = \"y\"\nabuot = \"z\"", "abuot"),
            ("name = \"x\"", "name = \"x y\"", "not a word"),
        ] {
            let text = GOOD.replacen(from, to, 1);
            let error = Scenario::parse(&text).expect_err(to);
            assert!(error.contains(said), "{to}: {error}");
        }
    }

    #[test]
    fn rust_and_toml_say_the_same() {
        let built = Scenario::new("x", "fault-and-drop")
            .gate("a", "user:a")
            .gate_giving("b", "entry:f", "w")
            .wait("reached a")
            .pause(1)
            .admit("b@w")
            .open("a")
            .expect("passed b@w");
        let text = "name = 'x'\nabout = ''\ncast = 'fault-and-drop'\ngate = [{ name = 'a', at = 'user:a' }, \
            { name = 'b', at = 'entry:f', gives = 'w' }]\nstep = [{ wait = 'reached a' }, { pause = 1 }, \
            { admit = 'b@w' }, { open = 'a' }, { expect = 'passed b@w' }]";
        assert_eq!(Scenario::parse(text).unwrap(), built);
    }
}
