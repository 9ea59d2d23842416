// SPDX-License-Identifier: MIT OR Apache-2.0
//! Follows a scenario: hears of the guest's tasks, and opens doors when it is time.
//!
//! Everything happens inside register accesses of the guest, under one lock, a leaf. Nothing is waited for: a step that cannot be
//! done is looked at again when something has been reported.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vgpu::gates::{Conductor, Doors, GateRecord, Role, Why};
use vgpu::oracle::describe;
use vgpu_spec::witness::{HEARTBEAT, HELLO, PAGE_CLEAN, RANGE_END, RANGE_SLOTS, RANGE_START, Record};

use super::order::{Chance, MAX_TURNS, Order, Turn, list};
use super::script::{Action, Concerns, Condition, Place, Script};

/// Lines of a repetition's story kept.
const MAX_LINES: usize = 400;
/// Doubts kept.
const MAX_DOUBTS: usize = 20;
/// Tasks whose role is remembered.
const MAX_ROLES: usize = 256;
/// Different (gate, role) counted.
const MAX_COUNTED: usize = 1024;
/// Without a script: how often those that wait look at their closed doors, with nothing else happening, before one is chosen.
/// The others have come to a gate, or to rest, by then.
const LOOKS: u32 = 24;
/// The same, before a turn of a list counts as one that does not come.
const PATIENCE: u32 = 40 * LOOKS;

/// Something that happened in a repetition.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Line {
    /// Heartbeats since the guest's witness was loaded.
    pub beat: u64,
    /// Who: a role, `scenario`, `oracle`, or `others`.
    pub who: String,
    /// What.
    pub what: String,
}

/// What came of a scenario.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScenarioResult {
    /// Its name.
    pub name: String,
    /// Repetitions that ended.
    pub repetitions: u64,
    /// The repetition in which a violation was found first.
    pub violated_in: Option<u64>,
    /// The order in which tasks were let through in that repetition, or in the last, where it was chosen and not written.
    pub order: Option<String>,
    /// What happened in that repetition, or in the last.
    pub story: Vec<Line>,
}

#[derive(Clone, Copy, Debug)]
struct Waiter {
    slot: usize,
    gate: usize,
    role: Role,
    let_go: bool,
}

/// A count by gate and role.
#[derive(Debug, Default)]
struct Counts(BTreeMap<(usize, Role), u64>);

impl Counts {
    /// One more; true if it is the first. What there is no room for is none.
    fn add(&mut self, gate: usize, role: Role) -> bool {
        if self.0.len() >= MAX_COUNTED && !self.0.contains_key(&(gate, role)) {
            return false;
        }
        let count = self.0.entry((gate, role)).or_default();
        *count += 1;
        *count == 1
    }
    fn find(&mut self, place: Place) -> Option<&mut u64> {
        let is = |gate: usize, role: Role| place.gate == gate && place.role.is_none_or(|r| r == role);
        self.0
            .iter_mut()
            .find(|((gate, role), count)| is(*gate, *role) && **count > 0)
            .map(|(_, count)| count)
    }
}

/// What is remembered of a repetition in which something was found.
#[derive(Debug)]
struct Kept {
    repetition: u64,
    chosen: Vec<Turn>,
    story: Vec<Line>,
}

#[derive(Debug, Default)]
struct State {
    beats: u64,
    begun: u64,
    ended: u64,
    repetition: Option<u64>,
    /// Sites that there are.
    there: u64,
    waiters: Vec<Waiter>,
    reached: Counts,
    passed: Counts,
    blocked: Vec<(Role, usize)>,
    gone: Vec<Role>,
    roles: BTreeMap<u32, Role>,
    open: Vec<Place>,
    step: usize,
    /// How often a repetition began or ended, or a task went on from a gate for the first time in one: whoever comes by again and
    /// again may do so without end.
    moves: u64,
    pause: Option<u64>,
    story: Vec<Line>,
    doubts: Vec<String>,
    /// Without a script: who went on, in which order; how often was looked since something happened; chance.
    chosen: Vec<Turn>,
    looks: u32,
    chance: Chance,
    astray: bool,
    kept: Option<Kept>,
}

/// Follows one scenario.
#[derive(Debug)]
pub struct Engine {
    name: String,
    script: Script,
    order: Option<Order>,
    state: Mutex<State>,
}

impl Engine {
    /// For a scenario; in an order other than its script's, if one is given.
    #[must_use]
    pub fn new(name: &str, script: Script, order: Option<Order>) -> Arc<Self> {
        Arc::new(Self { name: name.to_owned(), script, order, state: Mutex::default() })
    }

    /// Something was found: this repetition is the one to be shown. The first one counts.
    pub fn found(&self, what: &str) {
        let mut state = self.state.lock();
        state.tell("oracle", what.to_owned());
        if state.kept.is_none() {
            state.kept = Some(Kept {
                repetition: state.repetition.unwrap_or(state.begun.saturating_sub(1)),
                chosen: state.chosen.clone(),
                story: state.story.clone(),
            });
        }
    }

    /// The order that finds again what was found, where it was chosen.
    #[must_use]
    pub fn order(&self) -> Option<String> {
        self.order.as_ref()?;
        let state = self.state.lock();
        let chosen = state.kept.as_ref().map_or(&state.chosen, |kept| &kept.chosen);
        (!chosen.is_empty()).then(|| list(chosen))
    }

    /// The roles of tasks, by thread id.
    #[must_use]
    pub fn roles(&self) -> Vec<(u32, String)> {
        self.state.lock().roles.iter().map(|(pid, role)| (*pid, role.to_string())).collect()
    }

    /// A number that changes when something goes on: a task from where it was held, or the next repetition.
    #[must_use]
    pub fn moves(&self) -> u64 {
        self.state.lock().moves
    }

    /// Why it is not certain that things went as the scenario has it.
    #[must_use]
    pub fn doubts(&self) -> Vec<String> {
        let state = self.state.lock();
        let mut doubts = state.doubts.clone();
        if state.begun == 0 {
            doubts.push(format!("{} did not begin", self.name));
        } else if let Some(repetition) = state.repetition {
            doubts.push(format!(
                "repetition {repetition} of {} did not end{}",
                self.name,
                self.at(&state).map_or(String::new(), |step| format!("; it was at {step}"))
            ));
        }
        doubts
    }

    /// What came of it.
    #[must_use]
    pub fn result(&self) -> ScenarioResult {
        let order = self.order();
        let state = self.state.lock();
        let kept = state.kept.as_ref();
        ScenarioResult {
            name: self.name.clone(),
            repetitions: state.ended,
            violated_in: kept.map(|kept| kept.repetition),
            order,
            story: kept.map_or_else(|| state.story.clone(), |kept| kept.story.clone()),
        }
    }

    fn at(&self, state: &State) -> Option<String> {
        let (_, text) = self.script.steps.get(state.step).filter(|_| self.order.is_none())?;
        Some(format!("step {} (`{text}`)", state.step + 1))
    }

    fn site(&self, number: usize) -> &str {
        self.script.sites.get(number).map_or("?", |site| site.name.as_str())
    }

    /// Whether a gate is about others only.
    fn spares(&self, gate: usize, role: Role) -> bool {
        self.script.sites.get(gate).is_some_and(|site| !site.only.is_empty() && !site.only.contains(&role))
    }

    /// Whether the scenario decides on whoever comes there.
    fn decides(&self, state: &State, gate: usize, role: Role) -> bool {
        let Some(site) = self.script.sites.get(gate).filter(|site| !site.record) else { return false };
        match (&self.order, &site.concerns) {
            (Some(_), _) => !state.astray,
            (None, _) if state.step >= self.script.steps.len() => false,
            (None, Concerns::Nobody) => false,
            (None, Concerns::Roles(roles)) => roles.contains(&role),
            (None, Concerns::All) => true,
        }
    }

    fn gate(&self, state: &mut State, told: GateRecord, doors: &Doors) {
        match told {
            // The workload's own: nobody is held by us.
            GateRecord::Armed { local: true, .. } => {}
            GateRecord::Reached { slot: Some(slot), .. } if state.repetition.is_none() => doors.open(slot),
            GateRecord::Armed { iteration, sites, .. } => {
                state.moves += 1;
                state.begin(iteration, sites, self.order.as_ref());
            }
            GateRecord::Disarmed { iteration } if state.repetition == Some(iteration) => {
                state.moves += 1;
                self.end(state, doors);
            }
            _ if state.repetition.is_none() => {}
            GateRecord::Disarmed { .. } => {}
            // Somebody whom this gate is not about.
            GateRecord::Reached { site, slot, role, .. } if self.spares(site, role) => {
                slot.into_iter().for_each(|slot| doors.open(slot));
            }
            GateRecord::Passed { site, role, .. } if self.spares(site, role) => {}
            GateRecord::Reached { site, slot, role, spins, .. } => {
                state.reached.add(site, role);
                let verb = if slot.is_some() { "waits at" } else { "comes to" };
                state.tell(&who(role), format!("{verb} {}", self.site(site)));
                let Some(slot) = slot else { return };
                let open = |place: &Place| place.takes(site, role);
                // Who spins cannot wait for a choice.
                let free = self.order.is_some() && spins;
                let let_go = free || !self.decides(state, site, role) || state.open.iter().any(open);
                if let_go {
                    doors.open(slot);
                }
                state.waiters.retain(|waiter| waiter.slot != slot);
                state.waiters.push(Waiter { slot, gate: site, role, let_go });
            }
            GateRecord::Passed { site, slot, why, role } => {
                let decided = self.decides(state, site, role);
                state.waiters.retain(|waiter| Some(waiter.slot) != slot);
                let first = state.passed.add(site, role);
                state.moves += u64::from(slot.is_some() && first);
                state.tell(&who(role), format!("goes on from {}", self.site(site)));
                let why = match why {
                    Why::Opened | Why::Local | Why::Over => return,
                    Why::Limit => "it was closed for as long as a gate may be",
                    Why::Spun => "its caller cannot sleep there, and spins for a millisecond only",
                    Why::NoCpu => "its caller cannot sleep there, and no CPU would be left for the others",
                };
                if decided {
                    let text = format!("{} went on from {} by itself: {why}", who(role), self.site(site));
                    self.doubt(state, text);
                }
            }
            GateRecord::Blocked { site, role, .. } => {
                state.tell(&who(role), format!("is asleep in {}", self.site(site)));
                if state.blocked.len() < MAX_COUNTED {
                    state.blocked.push((role, site));
                }
            }
            GateRecord::Left { site, role, .. } => {
                state.tell(&who(role), format!("has left {}", self.site(site)));
                state.blocked.retain(|known| *known != (role, site));
            }
            GateRecord::Role { role, pid, gone: false } => {
                if state.roles.len() < MAX_ROLES || state.roles.contains_key(&pid) {
                    state.roles.insert(pid, role);
                }
                state.gone.retain(|gone| *gone != role);
            }
            GateRecord::Role { role, pid, gone: true } => {
                state.roles.remove(&pid);
                state.blocked.retain(|(blocked, _)| *blocked != role);
                if state.gone.len() < MAX_COUNTED {
                    state.gone.push(role);
                }
            }
        }
    }

    fn doubt(&self, state: &mut State, text: String) {
        if state.doubts.len() < MAX_DOUBTS {
            let repetition = state.repetition.unwrap_or(0);
            state.doubts.push(format!("{}, repetition {repetition}: {text}", self.name));
        }
    }

    fn end(&self, state: &mut State, doors: &Doors) {
        if let Some(step) = self.at(state) {
            self.doubt(state, format!("{step} was not come by"));
        }
        if let (Some(Order::List(turns)), false) = (&self.order, state.astray) {
            if let Some(turn) = turns.get(state.chosen.len()) {
                self.doubt(
                    state,
                    format!("{turn}, number {} of the order, did not come", state.chosen.len() + 1),
                );
            }
        }
        state.repetition = None;
        state.ended += 1;
        state.let_go(doors, |_| true, usize::MAX);
        state.waiters.clear();
    }

    /// Does what can be done.
    fn advance(&self, state: &mut State, doors: &Doors) {
        if state.repetition.is_none() || self.order.is_some() {
            return;
        }
        while let Some((action, text)) = self.script.steps.get(state.step) {
            if !self.done(state, action, text, doors) {
                return;
            }
            state.step += 1;
        }
        state.let_go(doors, |_| true, usize::MAX);
    }

    /// Does a step, or says that it is not its time.
    fn done(&self, state: &mut State, action: &Action, text: &str, doors: &Doors) -> bool {
        match action {
            Action::Wait(conditions) => {
                let possible = conditions.iter().any(|condition| state.is_there(condition.site()));
                let met = conditions.iter().any(|condition| self.holds(state, condition, true));
                !possible || met
            }
            Action::Open(place) if state.is_there(Some(place.gate)) => {
                state.tell("scenario", text.to_owned());
                state.open.push(*place);
                state.let_go(doors, |waiter| place.takes(waiter.gate, waiter.role), usize::MAX);
                true
            }
            Action::Admit(place) if state.is_there(Some(place.gate)) => {
                let one = state.let_go(doors, |waiter| place.takes(waiter.gate, waiter.role), 1) > 0;
                if one {
                    state.tell("scenario", text.to_owned());
                }
                one
            }
            Action::Open(_) | Action::Admit(_) => true,
            Action::Pause(beats) => {
                let until = *state.pause.get_or_insert(state.beats.saturating_add(*beats));
                let over = state.beats >= until;
                if over {
                    state.pause = None;
                }
                over
            }
            Action::Expect(condition, wanted) => {
                if state.is_there(condition.site()) && self.holds(state, condition, false) != *wanted {
                    let step = state.step + 1;
                    self.doubt(state, format!("step {step} (`{text}`) does not hold"));
                }
                true
            }
        }
    }

    fn holds(&self, state: &mut State, condition: &Condition, take: bool) -> bool {
        match condition {
            Condition::Reached(place)
                if self.script.sites.get(place.gate).is_some_and(|site| site.record) =>
            {
                let Some(count) = state.reached.find(*place) else { return false };
                // Who has only come by is waited for once.
                *count -= u64::from(take);
                true
            }
            Condition::Reached(place) => {
                state.waiters.iter().any(|waiter| !waiter.let_go && place.takes(waiter.gate, waiter.role))
            }
            Condition::Passed(place) => state.passed.find(*place).is_some(),
            Condition::Blocked(role, site) => state.blocked.contains(&(*role, *site)),
            Condition::Gone(role) => state.gone.contains(role),
        }
    }

    /// Chooses among those that wait, if all have come to rest.
    fn choose(&self, state: &mut State, doors: &Doors) {
        let Some(order) = &self.order else { return };
        let mut waiting: Vec<Turn> = Vec::new();
        for waiter in state.waiters.iter().filter(|waiter| !waiter.let_go) {
            let turn = Turn { gate: self.site(waiter.gate).to_owned(), role: waiter.role.to_string() };
            if !waiting.contains(&turn) {
                waiting.push(turn);
            }
        }
        // However many look.
        let waiters = state.waiters.len().max(1) as u32;
        if waiting.is_empty() || state.looks < LOOKS.saturating_mul(waiters) {
            return;
        }
        waiting.sort_by_key(Turn::to_string);
        let turn = match order {
            Order::Seed(_) => {
                let chosen = state.chance.below(waiting.len());
                waiting.swap_remove(chosen)
            }
            Order::List(turns) => match turns.get(state.chosen.len()) {
                Some(next) if waiting.contains(next) => next.clone(),
                Some(next) if state.looks < PATIENCE.saturating_mul(waiters) => {
                    let _ = next;
                    return;
                }
                Some(next) => {
                    let number = state.chosen.len() + 1;
                    let there = list(&waiting);
                    self.doubt(
                        state,
                        format!("{next}, number {number} of the order, does not come; there are {there}"),
                    );
                    state.astray = true;
                    state.let_go(doors, |_| true, usize::MAX);
                    return;
                }
                // It has ended: whoever comes first.
                None => waiting.swap_remove(0),
            },
        };
        state.looks = 0;
        let (script, gate) = (&self.script, turn.gate.clone());
        let is = |waiter: &Waiter| {
            script.sites.get(waiter.gate).is_some_and(|site| site.name == gate)
                && waiter.role.to_string() == turn.role
        };
        state.let_go(doors, is, 1);
        state.tell("scenario", format!("admit {turn}"));
        if state.chosen.len() < MAX_TURNS {
            state.chosen.push(turn);
        }
    }
}

impl Place {
    fn takes(&self, gate: usize, role: Role) -> bool {
        self.gate == gate && self.role.is_none_or(|own| own == role)
    }
}

impl Condition {
    fn site(&self) -> Option<usize> {
        match self {
            Self::Reached(place) | Self::Passed(place) => Some(place.gate),
            Self::Blocked(_, site) => Some(*site),
            Self::Gone(_) => None,
        }
    }
}

fn who(role: Role) -> String {
    if role.is_empty() { "others".to_owned() } else { role.to_string() }
}

impl State {
    fn begin(&mut self, iteration: u64, there: u64, order: Option<&Order>) {
        let chance = match order {
            Some(Order::Seed(seed)) => Chance::new(*seed, iteration),
            _ => Chance::default(),
        };
        let (beats, begun, ended, moves) = (self.beats, self.begun + 1, self.ended, self.moves);
        let (doubts, kept) = (std::mem::take(&mut self.doubts), self.kept.take());
        *self = Self {
            beats,
            begun,
            ended,
            moves,
            doubts,
            kept,
            repetition: Some(iteration),
            there,
            chance,
            ..Self::default()
        };
    }

    fn is_there(&self, site: Option<usize>) -> bool {
        site.is_none_or(|site| self.there >> site & 1 != 0)
    }

    fn tell(&mut self, who: &str, what: String) {
        if self.story.len() < MAX_LINES {
            self.story.push(Line { beat: self.beats, who: who.to_owned(), what });
        }
    }

    /// Lets at most so many of those go on that are meant; how many there were.
    fn let_go(&mut self, doors: &Doors, meant: impl Fn(&Waiter) -> bool, most: usize) -> usize {
        let held = self.waiters.iter_mut().filter(|waiter| !waiter.let_go && meant(waiter));
        held.take(most)
            .map(|waiter| {
                waiter.let_go = true;
                doors.open(waiter.slot);
            })
            .count()
    }
}

impl Conductor for Engine {
    fn record(&self, record: &Record, doors: &Doors) {
        let mut state = self.state.lock();
        if record.kind == HEARTBEAT {
            state.beats += 1;
        } else if let Some(told) = GateRecord::read(record) {
            state.looks = 0;
            self.gate(&mut state, told, doors);
        } else if state.repetition.is_some() && record.kind != HELLO {
            let role = state.roles.get(&record.pid).copied().unwrap_or_default();
            // What address spaces come and go by is part of the story whoever does it.
            if !role.is_empty() || !matches!(record.kind, RANGE_START | RANGE_END | RANGE_SLOTS | PAGE_CLEAN)
            {
                state.tell(&who(role), describe(record));
            }
        }
        self.advance(&mut state, doors);
    }

    fn looked(&self, _slot: usize, doors: &Doors) {
        if self.order.is_some() {
            let mut state = self.state.lock();
            state.looks = state.looks.saturating_add(1);
            self.choose(&mut state, doors);
        }
    }
}
