#!/bin/bash
@HEADER@

@SITE@

@ENVIRONMENT@

# All nodes meet at the first one, under the address by which Slurm itself reaches it, at a port drawn by chance.
head_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol --oneliner show node "$head_node" | grep -o ' NodeAddr=[^ ]*' | cut -d = -f 2)
export MASTER_ADDR=${MASTER_ADDR:-$head_node}
MASTER_PORT=$((10000 + $(od -An -N2 -tu2 /dev/urandom) % 20000))
export MASTER_PORT

@COMMANDS@

# Slurm tells this shell, not the ranks, that time runs out (--signal=B:): it tells them. They save and leave with 75.
told=
signals=0
step=
# shellcheck disable=SC2317  # a trap calls it
pass_on() {
  told=$1
  signals=$((signals + 1))
  if [[ -n $step ]]; then kill -s USR1 "$step" 2> /dev/null; fi
}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

"${agent[@]}" &
step=$!
if [[ -n $told ]]; then pass_on "$told"; fi
heard=-1
while [[ $signals -ne $heard ]]; do  # a signal ends `wait`, not the step
  heard=$signals
  wait "$step"
  code=$?
done
step=
if [[ $code -eq 0 ]]; then exit 0; fi

"${outcome[@]}" --code "$code" --told "$told"
code=$?
if [[ $code -ne 0 ]]; then exit "$code"; fi
if [[ $told == TERM ]]; then exit 75; fi

# Start again: the same job, or where that is not allowed another one, for which those that wait for this one then wait.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
if scontrol requeue "$job"; then exit 75; fi
next=$(env -u SLURM_RESTART_COUNT sbatch --parsable --dependency=afterany:"$SLURM_JOB_ID"@ARRAY@ "$0") || exit 1
next=${next%%;*}
echo "mellum2: job $next continues job $SLURM_JOB_ID"
squeue --noheader --me --states=PENDING --format='%i %E' | grep "afterok:$SLURM_JOB_ID(" | while read -r waiting on; do
  on=$(sed "s/([a-z_]*)//g; s/afterok:$SLURM_JOB_ID\\b/afterok:$next/" <<< "$on")
  scontrol update jobid="$waiting" dependency="$on"
done
exit 75
