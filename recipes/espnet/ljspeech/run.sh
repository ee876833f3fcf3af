#!/usr/bin/env bash
# ESPnet2 Tacotron2 on any corpus in LJSpeech layout, without Kaldi. Stages are numbered as in ESPnet's own tts.sh:
#
#   1 data folders   2 dump   4 long and short clips   5 token list   6 statistics   7 training   8 decoding
#   (passed over: 3 speaker embeddings, 9 scoring, 10 packing, 11 upload)
#
#   ./run.sh --data path/to/LJSpeech-1.1                                               # everything, on one GPU
#   ./run.sh --data path/to/corpus --fs 24000 --ngpu 0 --train_config conf/train_tacotron2_small.yaml
#   tts-brain run -- ./run.sh --stage 7 --train_config conf/train_tacotron2_brain.yaml # with the brain
#
# The script goes to its own folder first, so paths are relative to that, as in ESPnet; only --data and --python
# are taken from where you are. Options are ESPnet's: --stage --stop_stage --train_config --train_args --inference_config
# --inference_args --inference_model --tag --expdir --dumpdir --ngpu --nj --inference_nj --python --fs --token_type
# --g2p --cleaner and the like. Our own:
#
#   --data DIR       folder with metadata.csv and wavs/ (stage 1)
#   --dev_utts N     clips held out to watch the training (50)
#   --eval_utts N    clips held out to be decoded at the end (50)
#   --datadir DIR    where stage 1 writes (data)
set -euo pipefail

# General
stage=1
stop_stage=10000
skip_data_prep=false
skip_train=false
skip_eval=false
ngpu=1
nj=4
inference_nj=4
gpu_inference=false
dumpdir=dump
expdir=exp
datadir=data
python=python3

# Data and features
data=
dev_utts=50
eval_utts=50
train_set=train
valid_set=dev
test_sets="dev eval"
min_wav_duration=0.1
max_wav_duration=20
fs=22050
n_fft=1024
n_shift=256
win_length=null
fmin=80
fmax=7600
n_mels=80

# Text; g2p_en needs NLTK's data, so characters are the default
token_type=char
cleaner=tacotron
g2p=g2p_en_no_space
nlsyms_txt=none
srctexts=

# Training
train_config=conf/train_tacotron2.yaml
train_args=
tag=
tts_exp=
tts_stats_dir=
text_fold_length=150
speech_fold_length=800

# Decoding
inference_config=conf/decode.yaml
inference_args=
inference_tag=
inference_model=train.loss.ave.pth
vocoder_file=none

options="stage stop_stage skip_data_prep skip_train skip_eval ngpu nj inference_nj gpu_inference dumpdir expdir datadir
python data dev_utts eval_utts train_set valid_set test_sets min_wav_duration max_wav_duration fs n_fft n_shift
win_length fmin fmax n_mels token_type cleaner g2p nlsyms_txt srctexts train_config train_args tag tts_exp
tts_stats_dir text_fold_length speech_fold_length inference_config inference_args inference_tag inference_model
vocoder_file"

log() { echo "$(date '+%Y-%m-%dT%H:%M:%S') $*"; }
die() { echo "run.sh: $*" >&2; exit 2; }

while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h)
            sed -n '2,/^set -e/{/^set -e/d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --*=*) die "$1: write --name value, with a space" ;;
        --*) name=${1#--} ;;
        *) die "'$1' is no option; values with spaces need quotes: --train_args \"--max_epoch 1\"" ;;
    esac
    name=${name//-/_}  # ESPnet takes --stop-stage too
    [[ " ${options//$'\n'/ } " == *" ${name} "* ]] || die "unknown option --${name}. Known are:
$(for option in ${options}; do echo "--${option}"; done | sort | tr '\n' ' ' | fold -s -w 110)"
    [ $# -ge 2 ] || die "--${name} needs a value"
    printf -v "${name}" '%s' "$2"
    shift 2
done
for name in stage stop_stage ngpu nj inference_nj fs n_fft n_shift dev_utts eval_utts; do
    [[ "${!name}" =~ ^[0-9]+$ ]] || die "--${name} is '${!name}', but must be a whole number"
done
for name in nj inference_nj; do
    [ "${!name}" -ge 1 ] || die "--${name} must be at least 1"
done
for name in skip_data_prep skip_train skip_eval gpu_inference; do
    [[ "${!name}" =~ ^(true|false)$ ]] || die "--${name} is '${!name}', but must be true or false"
done
[[ "${token_type}" =~ ^(char|phn)$ ]] || die "--token_type is '${token_type}', but must be char or phn"

# Before the change of folder: what the caller wrote for --data and --python
if [ -n "${data}" ] && [ -d "${data}" ]; then
    data=$(cd "${data}" && pwd)
fi
if [[ "${python}" == */* ]] && [ -x "${python}" ]; then
    python=$(cd "$(dirname "${python}")" && pwd)/$(basename "${python}")
fi
cd "$(dirname "${BASH_SOURCE[0]}")"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONIOENCODING=UTF-8  # as ESPnet's path.sh
trap 'kill $(jobs -pr) 2> /dev/null || true' EXIT  # a background job does not hear Ctrl-C

# Names as in tts.sh, so that its other tools find everything
data_feats=${dumpdir}/raw
srctexts=${srctexts:-${datadir}/${train_set}/text}
kind=${token_type}
[ "${cleaner}" = none ] || kind+=_${cleaner}
[ "${token_type}" != phn ] || kind+=_${g2p}
token_list=${dumpdir}/token_list/${kind}/tokens.txt
squeeze() { echo "$1" | sed -e 's/--/_/g' -e 's/[ |=]//g'; }
[ -n "${tag}" ] || tag=$(basename "${train_config:-train}" .yaml)_raw_${kind}$(squeeze "${train_args}")
if [ -z "${inference_tag}" ]; then
    inference_tag=$(basename "${inference_config:-inference}" .yaml)$(squeeze "${inference_args}")
    inference_tag+=_$(echo "${inference_model%.*}" | tr / _)
fi
tts_stats_dir=${tts_stats_dir:-${expdir}/tts_stats_raw_${kind}}
tts_exp=${tts_exp:-${expdir}/tts_${tag}}
train_dir=${data_feats}/${train_set}
valid_dir=${data_feats}/${valid_set}

config=()
[ -z "${train_config}" ] || config=(--config "${train_config}")
text_options=(
    --use_preprocessor true --token_type "${token_type}" --token_list "${token_list}"
    --non_linguistic_symbols "${nlsyms_txt}" --cleaner "${cleaner}" --g2p "${g2p}"
)
feature_options=(
    --feats_extract fbank
    --feats_extract_conf "n_fft=${n_fft}" --feats_extract_conf "hop_length=${n_shift}"
    --feats_extract_conf "win_length=${win_length}" --feats_extract_conf "fs=${fs}"
    --feats_extract_conf "fmin=${fmin}" --feats_extract_conf "fmax=${fmax}" --feats_extract_conf "n_mels=${n_mels}"
)
data_options=(
    --train_data_path_and_name_and_type "${train_dir}/text,text,text"
    --train_data_path_and_name_and_type "${train_dir}/wav.scp,speech,sound"
    --valid_data_path_and_name_and_type "${valid_dir}/text,text,text"
    --valid_data_path_and_name_and_type "${valid_dir}/wav.scp,speech,sound"
)

runs() { [ "${stage}" -le "$1" ] && [ "${stop_stage}" -ge "$1" ]; }
pass_over() { if runs "$1"; then log "Stage $1: passed over ($2)"; fi; }
lines() { wc -l < "$1" | tr -d ' '; }
smallest() { printf '%s\n' "$@" | sort -n | head -n 1; }
need() { [ -s "$1" ] || die "$1 is missing or empty: run stage $2 first${3:+ ($3)}"; }
need_espnet() {
    ${python} -c 'import importlib.util as u, sys; sys.exit(u.find_spec("espnet2") is None)' ||
        die "${python} has no espnet2: install ESPnet there, or name another python with --python"
}
need_gpu() {
    [ "$1" -eq 0 ] || ${python} -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        die "${python} sees no GPU; on a CPU add: $2"
}
# split_keys KEYS N PATTERN: N files of about as many lines; @JOB@ in PATTERN becomes 1..N
split_keys() {
    awk -v n="$2" -v total="$(lines "$1")" -v out="$3" \
        '{ file = out; sub(/@JOB@/, int((NR - 1) * n / total) + 1, file); print > file }' "$1"
}
# parallel N LOG COMMAND...: what run.pl JOB=1:N does; @JOB@ in every word becomes 1..N
parallel() {
    local n=$1 log_file=$2 pids=() failed=0 i
    shift 2
    for i in $(seq "${n}"); do
        "${@//@JOB@/${i}}" > "${log_file//@JOB@/${i}}" 2>&1 &
        pids+=($!)
    done
    for i in $(seq "${n}"); do
        wait "${pids[i - 1]}" || failed=${i}
    done
    [ "${failed}" -eq 0 ] || explain "${log_file//@JOB@/${failed}}"
}
explain() {
    echo "--- the end of $1" >&2
    tail -n 20 "$1" >&2
    if tail -n 3 "$1" | grep -q 'unrecognized arguments: brain'; then
        die "plain ESPnet does not know the key 'brain' of ${train_config}; write: tts-brain run -- ./run.sh ..."
    fi
    die "failed; the whole log: $1"
}

if ${skip_data_prep}; then
    log "Stages 1 to 5: passed over (--skip_data_prep)"
else
    if runs 1; then
        log "Stage 1: ${data:-?} -> ${datadir}/{train,dev,eval}"
        [ -n "${data}" ] || die "stage 1 needs the corpus: --data DIR, the folder with metadata.csv and wavs/"
        ${python} local/data_prep.py --data "${data}" --out "${datadir}" --fs "${fs}" \
            --dev-utts "${dev_utts}" --eval-utts "${eval_utts}"
    fi

    if runs 2; then
        log "Stage 2: ${datadir} -> ${data_feats}; audio stays where it is, soundfile reads wav and flac"
        for dset in "${train_set}" "${valid_set}" ${test_sets}; do
            need "${datadir}/${dset}/wav.scp" 1
            target=${data_feats}/${dset}
            [ "${dset}" != "${train_set}" ] && [ "${dset}" != "${valid_set}" ] || target=${data_feats}/org/${dset}
            mkdir -p "${target}"
            cp "${datadir}/${dset}"/{wav.scp,text,utt2spk,spk2utt,utt2num_samples} "${target}"
            echo raw > "${target}/feats_type"
        done
    fi

    pass_over 3 "no speaker embeddings: one speaker"

    if runs 4; then
        log "Stage 4: clips of ${min_wav_duration} to ${max_wav_duration} s, ${data_feats}/org -> ${data_feats}"
        for dset in "${train_set}" "${valid_set}"; do
            org=${data_feats}/org/${dset}
            need "${org}/wav.scp" 2
            target=${data_feats}/${dset}
            mkdir -p "${target}"
            cp "${org}/feats_type" "${target}"
            awk -v low="${min_wav_duration}" -v high="${max_wav_duration}" -v fs="${fs}" \
                '$2 > low * fs && $2 < high * fs' "${org}/utt2num_samples" > "${target}/utt2num_samples"
            for file in wav.scp text utt2spk; do
                awk 'NR == FNR { keep[$1]; next } $1 in keep' "${target}/utt2num_samples" "${org}/${file}" \
                    > "${target}/${file}"
            done
            awk '{ of[$2] = of[$2] " " $1 } END { for (s in of) print s of[s] }' "${target}/utt2spk" \
                > "${target}/spk2utt"
            log "${target}: $(lines "${target}/wav.scp") of $(lines "${org}/wav.scp") clips"
            [ -s "${target}/wav.scp" ] || die "no clip of ${dset} is left: see --min_wav_duration, --max_wav_duration"
        done
    fi

    if runs 5; then
        log "Stage 5: ${token_list} from ${srctexts}"
        need_espnet
        for file in ${srctexts}; do need "${file}" 1; done
        mkdir -p "${data_feats}"
        # shellcheck disable=SC2086
        cat ${srctexts} | awk 'NF != 1' > "${data_feats}/srctexts"
        ${python} -m espnet2.bin.tokenize_text \
            --token_type "${token_type}" -f 2- \
            --input "${data_feats}/srctexts" --output "${token_list}" \
            --non_linguistic_symbols "${nlsyms_txt}" \
            --cleaner "${cleaner}" \
            --g2p "${g2p}" \
            --write_vocabulary true \
            --add_symbol "<blank>:0" --add_symbol "<unk>:1" --add_symbol "<sos/eos>:-1"
    fi
fi

if ${skip_train}; then
    log "Stages 6 and 7: passed over (--skip_train)"
else
    if runs 6; then
        log "Stage 6: statistics -> ${tts_stats_dir}"
        need_espnet
        need "${train_dir}/wav.scp" 4
        need "${valid_dir}/wav.scp" 4
        need "${token_list}" 5
        logdir=${tts_stats_dir}/logdir
        mkdir -p "${logdir}"
        jobs=$(smallest "${nj}" "$(lines "${train_dir}/wav.scp")" "$(lines "${valid_dir}/wav.scp")")
        split_keys "${train_dir}/wav.scp" "${jobs}" "${logdir}/train.@JOB@.scp"
        split_keys "${valid_dir}/wav.scp" "${jobs}" "${logdir}/valid.@JOB@.scp"
        # shellcheck disable=SC2086
        parallel "${jobs}" "${logdir}/stats.@JOB@.log" \
            ${python} -m espnet2.bin.tts_train \
            --collect_stats true \
            --write_collected_feats false \
            "${text_options[@]}" \
            --normalize none --pitch_normalize none --energy_normalize none \
            "${data_options[@]}" \
            --train_shape_file "${logdir}/train.@JOB@.scp" \
            --valid_shape_file "${logdir}/valid.@JOB@.scp" \
            --output_dir "${logdir}/stats.@JOB@" \
            ${config[@]+"${config[@]}"} "${feature_options[@]}" ${train_args}
        inputs=()
        for i in $(seq "${jobs}"); do inputs+=(--input_dir "${logdir}/stats.${i}"); done
        ${python} -m espnet2.bin.aggregate_stats_dirs "${inputs[@]}" --output_dir "${tts_stats_dir}"
        for dset in train valid; do  # the number of tokens as last dimension, for batch_type numel
            awk -v N="$(lines "${token_list}")" '{ print $0 "," N }' "${tts_stats_dir}/${dset}/text_shape" \
                > "${tts_stats_dir}/${dset}/text_shape.${token_type}"
        done
    fi

    if runs 7; then
        log "Stage 7: training -> ${tts_exp} (log: ${tts_exp}/train.log)"
        need_espnet
        need "${token_list}" 5
        need "${tts_stats_dir}/train/feats_stats.npz" 6
        need_gpu "${ngpu}" "--ngpu 0 --train_config conf/train_tacotron2_small.yaml"
        mkdir -p "${tts_exp}"
        # The log of an earlier start is added to. The last two options are what espnet2.bin.launch adds.
        # shellcheck disable=SC2086
        ${python} -m espnet2.bin.tts_train \
            "${text_options[@]}" \
            --normalize global_mvn \
            --resume true \
            --fold_length "${text_fold_length}" \
            --fold_length "$((speech_fold_length * n_shift))" \
            --output_dir "${tts_exp}" \
            ${config[@]+"${config[@]}"} "${feature_options[@]}" "${data_options[@]}" \
            --train_shape_file "${tts_stats_dir}/train/text_shape.${token_type}" \
            --train_shape_file "${tts_stats_dir}/train/speech_shape" \
            --valid_shape_file "${tts_stats_dir}/valid/text_shape.${token_type}" \
            --valid_shape_file "${tts_stats_dir}/valid/speech_shape" \
            --normalize_conf "stats_file=${tts_stats_dir}/train/feats_stats.npz" \
            ${train_args} \
            --ngpu "${ngpu}" --multiprocessing_distributed true 2>&1 | tee -a "${tts_exp}/train.log" ||
            explain "${tts_exp}/train.log"
    fi
fi

if ${skip_eval}; then
    log "Stage 8: passed over (--skip_eval)"
elif runs 8; then
    log "Stage 8: decoding -> ${tts_exp}/${inference_tag}"
    need_espnet
    need "${tts_exp}/${inference_model}" 7 "or name a model of ${tts_exp} with --inference_model"
    infer_ngpu=0
    if ${gpu_inference}; then infer_ngpu=1; fi
    infer_config=()
    [ -z "${inference_config}" ] || infer_config=(--config "${inference_config}")
    for dset in ${test_sets}; do
        from=${data_feats}/${dset}
        need "${from}/text" 4
        to=${tts_exp}/${inference_tag}/${dset}
        rm -rf "${to}/log"
        mkdir -p "${to}/log"
        cp "${from}/feats_type" "${to}"
        jobs=$(smallest "${inference_nj}" "$(lines "${from}/text")")
        split_keys "${from}/text" "${jobs}" "${to}/log/keys.@JOB@.scp"
        # shellcheck disable=SC2086
        parallel "${jobs}" "${to}/log/tts_inference.@JOB@.log" \
            ${python} -m espnet2.bin.tts_inference \
            --ngpu "${infer_ngpu}" \
            --data_path_and_name_and_type "${from}/text,text,text" \
            --data_path_and_name_and_type "${from}/wav.scp,speech,sound" \
            --key_file "${to}/log/keys.@JOB@.scp" \
            --model_file "${tts_exp}/${inference_model}" \
            --train_config "${tts_exp}/config.yaml" \
            --output_dir "${to}/log/output.@JOB@" \
            --vocoder_file "${vocoder_file}" \
            ${infer_config[@]+"${infer_config[@]}"} ${inference_args}
        for what in norm/feats.scp denorm/feats.scp speech_shape/speech_shape durations/durations \
            focus_rates/focus_rates; do
            [ -e "${to}/log/output.1/${what}" ] || continue
            target=${to}/${what}
            [[ "${what}" == *.scp ]] || target=${to}/${what%/*}  # the others are one file each, not a folder
            mkdir -p "$(dirname "${target}")"
            cat "${to}"/log/output.*/"${what}" | LC_ALL=C sort -k1 > "${target}"
        done
        for what in wav att_ws probs; do
            [ -e "${to}/log/output.1/${what}" ] || continue
            mkdir -p "${to}/${what}"
            mv "${to}"/log/output.*/"${what}"/* "${to}/${what}"
        done
        for file in "${to}"/wav/*.wav; do
            echo "$(basename "${file}" .wav) ${file}"
        done | LC_ALL=C sort -k1 > "${to}/wav/wav.scp"
        log "${to}/wav: $(lines "${to}/wav/wav.scp") clips"
    done
fi

pass_over 9 "VERSA scoring"
pass_over 10 "packing"
pass_over 11 "upload"
log "Done in ${SECONDS} s"
